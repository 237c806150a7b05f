# The CUDA library: module cvmk/_native_cuda with the CUDA runtime linked statically.
# Sets CVMK_CUDA_REASON where it is not built.

if(CVMK_CUDA STREQUAL "OFF")
  set(CVMK_CUDA_REASON "the package was built with CVMK_CUDA=OFF")
  return()
endif()
if(CVMK_NATIVE_REASON)
  cvmk_decline(CVMK_CUDA CVMK_CUDA_REASON "the CUDA library needs the native library: ${CVMK_NATIVE_REASON}")
  return()
endif()

include(cuda_arch)
cvmk_visible_gpus(gpu_capabilities)
if(CVMK_CUDA STREQUAL "AUTO" AND NOT gpu_capabilities)
  cvmk_decline(CVMK_CUDA CVMK_CUDA_REASON "no NVIDIA GPU was visible when the package was built (CVMK_CUDA=ON builds without one)")
  return()
endif()

cvmk_cuda_architectures(CVMK_CUDA_ARCHS "${gpu_capabilities}")
set(CMAKE_CUDA_ARCHITECTURES "${CVMK_CUDA_ARCHS}")
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  cvmk_decline(CVMK_CUDA CVMK_CUDA_REASON "nvcc was not found when the package was built: put it on PATH or set CUDACXX to it")
  return()
endif()
enable_language(CUDA)

set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)

# Kernels and their bindings alike are csrc/<folder>/cuda_<name>.cu.
file(GLOB CVMK_CUDA_SOURCES CONFIGURE_DEPENDS "csrc/*/cuda_*.cu")
pybind11_add_module(_native_cuda NO_EXTRAS csrc/bindings/cuda.cu ${CVMK_CUDA_SOURCES})
target_include_directories(_native_cuda PRIVATE csrc)
target_compile_definitions(_native_cuda PRIVATE CVMK_VERSION="${PROJECT_VERSION}")
target_compile_options(_native_cuda PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>")
set_target_properties(_native_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
install(TARGETS _native_cuda LIBRARY DESTINATION cvmk)

message(STATUS "cvmk: CUDA library with nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${CVMK_CUDA_ARCHS}")
