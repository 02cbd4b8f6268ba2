# SPDX-License-Identifier: MIT
# find_package(natten_ops) gives natten_ops::natten_ops: a program that links it has torch.ops.natten, without Python.
# Point CMake here with natten_ops_DIR, or with CMAKE_PREFIX_PATH at the site-packages folder that holds natten_ops.
cmake_minimum_required(VERSION 3.25)

set(NATTEN_OPS_LIBRARY "" CACHE FILEPATH "libnatten_ops.so, if it is not beside its CMake file")
set(_natten_ops_library "${NATTEN_OPS_LIBRARY}")
if(NOT _natten_ops_library)
  cmake_path(GET CMAKE_CURRENT_LIST_DIR PARENT_PATH _natten_ops_library)
  cmake_path(APPEND _natten_ops_library libnatten_ops.so)
  if(NOT EXISTS "${_natten_ops_library}")  # an editable install: this file is among the sources, the library is not
    if(NOT Python_EXECUTABLE)
      find_package(Python QUIET COMPONENTS Interpreter)
    endif()
    execute_process(COMMAND "${Python_EXECUTABLE}" -c "import natten_ops; print(natten_ops.library_path())"
      OUTPUT_VARIABLE _natten_ops_library OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
endif()
if(NOT EXISTS "${_natten_ops_library}")
  set(natten_ops_FOUND FALSE)
  set(natten_ops_NOT_FOUND_MESSAGE "libnatten_ops.so not found: set NATTEN_OPS_LIBRARY to what natten_ops.library_path() "
    "says in Python, or Python_EXECUTABLE to a Python that has natten_ops.")
  list(JOIN natten_ops_NOT_FOUND_MESSAGE "" natten_ops_NOT_FOUND_MESSAGE)
elseif(NOT TARGET natten_ops::natten_ops)
  add_library(natten_ops::natten_ops SHARED IMPORTED)
  set_target_properties(natten_ops::natten_ops PROPERTIES
    IMPORTED_LOCATION "${_natten_ops_library}"
    # Nothing refers to a symbol of the library: it registers its ops when it is loaded, and linkers drop such libraries.
    INTERFACE_LINK_OPTIONS "LINKER:--no-as-needed")
endif()
unset(_natten_ops_library)
