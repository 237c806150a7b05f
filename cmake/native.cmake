# The CPU library: target cvmk_cpu (kernels, no Python) and the module cvmk/_native.
# Sets CVMK_NATIVE_REASON where it is not built.

if(CVMK_NATIVE STREQUAL "OFF")
  set(CVMK_NATIVE_REASON "the package was built with CVMK_NATIVE=OFF")
  return()
endif()

include(CheckLanguage)
check_language(CXX)
if(NOT CMAKE_CXX_COMPILER)
  cvmk_decline(CVMK_NATIVE CVMK_NATIVE_REASON "no C++ compiler was found when the package was built")
  return()
endif()
enable_language(CXX)

find_package(Python 3.11 COMPONENTS Interpreter Development.Module)
if(NOT Python_Development.Module_FOUND)
  cvmk_decline(CVMK_NATIVE CVMK_NATIVE_REASON "the Python headers were not found when the package was built")
  return()
endif()

if(NOT pybind11_ROOT AND NOT pybind11_DIR)
  execute_process(COMMAND "${Python_EXECUTABLE}" -m pybind11 --cmakedir OUTPUT_VARIABLE pybind11_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
set(PYBIND11_FINDPYTHON ON)
find_package(pybind11 3.0 CONFIG)
if(NOT pybind11_FOUND)
  cvmk_decline(CVMK_NATIVE CVMK_NATIVE_REASON "pybind11 3.0 or newer was not found when the package was built")
  return()
endif()

set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release)
endif()

option(CVMK_WERROR "treat C++ warnings as errors" OFF)
add_library(cvmk_warnings INTERFACE)
target_compile_options(cvmk_warnings INTERFACE "$<$<COMPILE_LANG_AND_ID:CXX,GNU,Clang,AppleClang>:-Wall;-Wextra;-Wpedantic;-Wconversion;-Wshadow>")
if(CVMK_WERROR)
  target_compile_options(cvmk_warnings INTERFACE "$<$<COMPILE_LANG_AND_ID:CXX,GNU,Clang,AppleClang>:-Werror>")
endif()

add_library(cvmk_cpu STATIC csrc/common/blocks.cpp csrc/common/cpu_features.cpp csrc/common/scratch.cpp csrc/common/team.cpp csrc/distill/loss.cpp csrc/gemm/pack.cpp csrc/sketch/sketch.cpp
  csrc/engine/candidates.cpp csrc/engine/decoding.cpp csrc/engine/engine.cpp csrc/engine/memory.cpp csrc/engine/mixers.cpp csrc/engine/model.cpp csrc/engine/model_weights.cpp csrc/engine/pool.cpp csrc/engine/projection.cpp csrc/engine/scheduler.cpp csrc/engine/source.cpp csrc/engine/weights.cpp)
target_include_directories(cvmk_cpu PUBLIC csrc)
target_link_libraries(cvmk_cpu PRIVATE cvmk_warnings)

# Folders of csrc with kernels and the levels that they are compiled for; each has csrc/bindings/<folder>.cpp too.
include(cpu_isa)
cvmk_kernels(cvmk_cpu attention base avx2 avx512 amx)
cvmk_kernels(cvmk_cpu distill base avx2 avx512 amx)
cvmk_kernels(cvmk_cpu gemm base avx2 avx512 amx)
cvmk_kernels(cvmk_cpu linear base avx2 avx512 amx)
cvmk_kernels(cvmk_cpu scan base avx2 avx512)  # a scan has no matrix products
cvmk_kernels(cvmk_cpu cached base avx2 avx512)
cvmk_kernels(cvmk_cpu conv base avx2 avx512)
cvmk_kernels(cvmk_cpu embed base avx2 avx512)
cvmk_kernels(cvmk_cpu norm base avx2 avx512)
cvmk_kernels(cvmk_cpu optimizer base avx2 avx512)
cvmk_kernels(cvmk_cpu recurrent base avx2 avx512)
cvmk_kernels(cvmk_cpu vocabulary base avx2 avx512)
set(CVMK_BINDINGS attention conv distill embed engine gemm linear norm optimizer scan)
list(TRANSFORM CVMK_BINDINGS REPLACE "(.+)" "csrc/bindings/\\1.cpp")
find_package(Threads REQUIRED)
target_link_libraries(cvmk_cpu PUBLIC Threads::Threads)
if(OpenMP_CXX_FOUND)
  target_link_libraries(cvmk_cpu PUBLIC OpenMP::OpenMP_CXX)
endif()

# NO_EXTRAS: link-time optimisation could move code compiled for one instruction set into code that runs on all.
pybind11_add_module(_native NO_EXTRAS csrc/bindings/cpu.cpp csrc/bindings/memory.cpp ${CVMK_BINDINGS})
target_link_libraries(_native PRIVATE cvmk_cpu cvmk_warnings)
target_compile_definitions(_native PRIVATE CVMK_VERSION="${PROJECT_VERSION}")
install(TARGETS _native LIBRARY DESTINATION cvmk)

message(STATUS "cvmk: native library with ${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION} (if it does not compile: CVMK_NATIVE=OFF pip install .)")
