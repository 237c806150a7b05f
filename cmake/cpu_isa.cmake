# Kernels compiled once for every instruction-set level (csrc/common/cpu_features.h says what a level may use).

find_package(OpenMP COMPONENTS CXX QUIET)
if(NOT OpenMP_CXX_FOUND)
  message(STATUS "cvmk: OpenMP was not found, kernels run on one thread")
endif()

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$" AND CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
  set(CVMK_ISA_LEVELS base avx2 avx512 amx)
else()
  set(CVMK_ISA_LEVELS base)
endif()
set(CVMK_KERNEL_OPTIMISATION -O3 CACHE STRING "optimisation of the kernels (-Og builds the sanitised tests sooner)")
set(CVMK_ISA_FLAGS_base "")
set(CVMK_ISA_FLAGS_avx2 -mavx2 -mfma -mf16c -mbmi2)
set(CVMK_ISA_FLAGS_avx512 ${CVMK_ISA_FLAGS_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
set(CVMK_ISA_FLAGS_amx ${CVMK_ISA_FLAGS_avx512} -mavx512vnni -mavx512bf16 -mamx-tile -mamx-int8 -mamx-bf16)

# The AMX kernels on processors without AMX, for tests: a header replaces the intrinsics, and the features count as present where AVX-512 with VNNI
# and BF16 is (cpu_features.cpp). The build record and `cvmk doctor` tell such a build.
option(CVMK_EMULATE_AMX "for tests, never for use: AMX kernels compute with AVX-512" OFF)
set(CVMK_EMULATED "")
if(CVMK_EMULATE_AMX)
  if(NOT "amx" IN_LIST CVMK_ISA_LEVELS)
    message(FATAL_ERROR "CVMK_EMULATE_AMX=ON needs an x86-64 processor and GCC or Clang: set it to OFF.")
  endif()
  set(CVMK_EMULATED AMX)
  list(APPEND CVMK_ISA_FLAGS_amx -include "${CMAKE_CURRENT_SOURCE_DIR}/csrc/tests/amx_on_avx512.h")
  set_source_files_properties(csrc/common/cpu_features.cpp PROPERTIES COMPILE_DEFINITIONS CVMK_EMULATE_AMX)
endif()

# GCC 12 warns of its own intrinsics' undefined operands (bug 105593), hence no warning of uninitialised values.
set(CVMK_KERNEL_FLAGS ${CVMK_KERNEL_OPTIMISATION} -ffp-contract=fast -fno-math-errno -fno-trapping-math -fno-exceptions -Wno-uninitialized -Wno-maybe-uninitialized)

# cvmk_kernels(<target> <folder> <level>...): adds csrc/<folder>/dispatch.cpp, and csrc/<folder>/kernels.cpp once for each of these levels that there
# are here, with CVMK_LEVEL=<level>. A folder that lacks a level uses the one below (common/levels.h).
function(cvmk_kernels target folder)
  set(path ${cvmk_SOURCE_DIR}/csrc/${folder})
  get_filename_component(name ${folder} NAME)
  target_sources(${target} PRIVATE ${path}/dispatch.cpp)
  set(have "")
  foreach(level IN LISTS CVMK_ISA_LEVELS)
    if(level IN_LIST ARGN)
      set(objects ${target}_${name}_${level})
      add_library(${objects} OBJECT ${path}/kernels.cpp)
      target_include_directories(${objects} PRIVATE ${cvmk_SOURCE_DIR}/csrc)
      target_compile_definitions(${objects} PRIVATE CVMK_LEVEL=${level})
      target_compile_options(${objects} PRIVATE ${CVMK_KERNEL_FLAGS} ${CVMK_ISA_FLAGS_${level}})
      target_link_libraries(${objects} PRIVATE cvmk_warnings)
      target_sources(${target} PRIVATE $<TARGET_OBJECTS:${objects}>)
      list(APPEND have CVMK_HAVE_${level})
    endif()
  endforeach()
  set_source_files_properties(${path}/dispatch.cpp PROPERTIES COMPILE_DEFINITIONS "${have}")
endfunction()
