# Which GPUs are here, and which architectures to compile for.

# cvmk_visible_gpus(<out>): the distinct compute capabilities of the visible GPUs as "90;80"; "unknown" where there is a GPU
# that cannot be asked; empty where there is none.
function(cvmk_visible_gpus out)
  set(${out} "" PARENT_SCOPE)
  if(DEFINED ENV{CUDA_VISIBLE_DEVICES} AND "$ENV{CUDA_VISIBLE_DEVICES}" MATCHES "^(-1|NoDevFiles)?$")
    return()
  endif()
  find_program(CVMK_NVIDIA_SMI nvidia-smi)
  if(CVMK_NVIDIA_SMI)
    execute_process(COMMAND "${CVMK_NVIDIA_SMI}" --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE answer RESULT_VARIABLE status OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]" capabilities "${answer}")
    if(status EQUAL 0 AND capabilities)
      list(REMOVE_DUPLICATES capabilities)
      list(TRANSFORM capabilities REPLACE "\\." "")
      set(${out} "${capabilities}" PARENT_SCOPE)
      return()
    endif()
  endif()
  file(GLOB devices "/dev/nvidia[0-9]*")
  if(devices)
    set(${out} unknown PARENT_SCOPE)
  endif()
endfunction()

# cvmk_cuda_architectures(<out> <capabilities>): -DCVMK_CUDA_ARCHS or the environment variable, else the GPUs that are here,
# else 80-real;90a-real;90-virtual. Hopper needs 90a for wgmma and TMA.
function(cvmk_cuda_architectures out capabilities)
  if(NOT CVMK_CUDA_ARCHS AND DEFINED ENV{CVMK_CUDA_ARCHS})
    set(CVMK_CUDA_ARCHS "$ENV{CVMK_CUDA_ARCHS}")
  endif()
  if(CVMK_CUDA_ARCHS)
    set(${out} "${CVMK_CUDA_ARCHS}" PARENT_SCOPE)
  elseif(capabilities AND NOT capabilities STREQUAL "unknown")
    list(TRANSFORM capabilities REPLACE "^90$" "90a")
    list(TRANSFORM capabilities APPEND "-real")
    set(${out} "${capabilities}" PARENT_SCOPE)
  else()
    set(${out} "80-real;90a-real;90-virtual" PARENT_SCOPE)
  endif()
endfunction()
