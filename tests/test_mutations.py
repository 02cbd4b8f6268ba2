# SPDX-License-Identifier: MIT
"""Mistakes in kernels are noticed on the emulator: every mutation of emulation/mutations.txt is caught."""

import collections

import mutations
import pytest

ALL = {mutation.name: mutation for mutation in mutations.read()}


def test_every_name_is_used_once():
    names = collections.Counter(mutation.name for mutation in mutations.read())
    assert {name: count for name, count in names.items() if count > 1} == {}
    assert {mutation.check for mutation in ALL.values()} == set(mutations.CHECKS)


@pytest.mark.parametrize("name", ALL)
def test_every_mutation_has_one_place(name, tmp_path):
    mutation = ALL[name]
    source, copy = mutations.ROOT / mutation.file, tmp_path / mutation.file
    copy.parent.mkdir(parents=True)
    copy.write_text(source.read_text())
    mutations.apply(mutation, tmp_path)
    assert copy.read_text() != source.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("check", mutations.CHECKS)
def test_the_sources_as_they_are_pass(check, tmp_path):
    assert mutations.CHECKS[check](mutations.copy_sources(tmp_path)) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_every_mutation_is_caught(name, tmp_path):
    assert mutations.what_catches(ALL[name], tmp_path) is not None
