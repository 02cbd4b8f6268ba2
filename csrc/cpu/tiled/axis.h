// SPDX-License-Identifier: MIT
// An axis without dilation and stride: tokens are put in places, dilation group after dilation group, so that the keys
// of a query are consecutive places and both ends of its window never move back from one query to the next. Everything
// above this file knows places only.
#pragma once
#include "../../problem.h"

namespace natten {
namespace {

// The places of the tokens [0, length) of a box: first the group of tokens = shift (mod dilation), then = shift + 1, ..
struct Places {
  int64_t length, dilation, shift, quotient, rest;

  static Places of(int64_t length, int64_t dilation, int64_t shift) {
    return {length, dilation, shift, length / dilation, length % dilation};
  }
  // Places before a group, 0 <= group <= dilation.
  int64_t begin(int64_t group) const {
    const int64_t turn = dilation - shift;             // groups before the residue wraps to 0
    const int64_t longer = larger(rest - shift, 0);    // of those, the ones with a token more
    return group * quotient + (group <= turn ? smaller(group, longer) : longer + smaller(group - turn, rest));
  }
  int64_t token(int64_t group, int64_t index) const { return (group + shift) % dilation + dilation * index; }
  int64_t group_at(int64_t place) const {
    int64_t low = 0, high = dilation - 1;  // the last group that begins at or before the place
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (begin(middle) <= place) low = middle;
      else high = middle - 1;
    }
    return low;
  }
};

// A query of one axis: its token, the places [first, end) of its keys, and the entry of the bias table of the first.
struct Query {
  int64_t token, first, end, bias;
};

// Of its window the slots [from, from + size), as far as it has them.
inline Query part_of(const Query& q, int64_t from, int64_t size) {
  const int64_t first = smaller(q.first + from, q.end);
  return {q.token, first, smaller(first + size, q.end), q.bias + from};
}

struct PlacedAxis {
  Axis axis;
  int64_t q_origin, kv_origin;
  Places queries, keys;

  static PlacedAxis of(const Problem& p, int a) {
    const int64_t d = p.axis[a].dilation, apart = (p.q_origin[a] - p.kv_origin[a]) % d;
    return {p.axis[a], p.q_origin[a], p.kv_origin[a], Places::of(p.q_shape[a], d, 0),
            Places::of(p.kv_shape[a], d, apart < 0 ? apart + d : apart)};
  }
  Query query(int64_t group, int64_t index) const {
    const int64_t token = queries.token(group, index), at = token + q_origin;
    const Span span = window(axis, at);
    const int64_t key = span.group + axis.dilation * span.first - kv_origin;  // a token of the box, hence >= 0
    const int64_t first = keys.begin(group) + key / axis.dilation;
    return {token, first, first + span.end - span.first, axis.kernel - 1 + span.first - at / axis.dilation};
  }
  // Calls visit(query) for the places [begin, end).
  template <class Visit> void for_queries(int64_t begin, int64_t end, const Visit& visit) const {
    for (int64_t group = queries.group_at(begin), place = begin; place < end; ++group) {
      const int64_t from = queries.begin(group), stop = smaller(queries.begin(group + 1), end);
      for (; place < stop; ++place) visit(query(group, place - from));
    }
  }
  // Calls visit(token) for the places [begin, end) of keys.
  template <class Visit> void for_keys(int64_t begin, int64_t end, const Visit& visit) const {
    for (int64_t group = keys.group_at(begin), place = begin; place < end; ++group) {
      const int64_t from = keys.begin(group), stop = smaller(keys.begin(group + 1), end);
      for (; place < stop; ++place) visit(keys.token(group, place - from));
    }
  }
  Query query_at(int64_t place) const {
    const int64_t group = queries.group_at(place);
    return query(group, place - queries.begin(group));
  }
  int64_t key_token(int64_t place) const {
    const int64_t group = keys.group_at(place);
    return keys.token(group, place - keys.begin(group));
  }
  // The end of the dilation group of a query place.
  int64_t group_end(int64_t place) const { return queries.begin(queries.group_at(place) + 1); }
};

}  // namespace
}  // namespace natten
