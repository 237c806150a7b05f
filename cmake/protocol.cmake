# The service's protocol, compiled: cvmk/serving/realtime_translation.binpb, a FileDescriptorSet, from which cvmk.serving makes its message classes. It is the
# same for every version of protobuf, which generated Python code is not. It is not made where grpcio-tools is missing; `cvmk serve` says so.
find_package(Python 3.11 COMPONENTS Interpreter)
if(Python_Interpreter_FOUND)
  execute_process(COMMAND "${Python_EXECUTABLE}" -c "import grpc_tools.protoc" RESULT_VARIABLE CVMK_PROTOC_MISSING OUTPUT_QUIET ERROR_QUIET)
endif()
if(NOT Python_Interpreter_FOUND OR CVMK_PROTOC_MISSING)
  message(STATUS "cvmk: the protocol of `cvmk serve` is not compiled: the Python package grpcio-tools was not found")
  return()
endif()

set(protocol "${CMAKE_CURRENT_SOURCE_DIR}/cvmk/serving/realtime_translation.proto")
set(compiled "${CMAKE_CURRENT_BINARY_DIR}/realtime_translation.binpb")
add_custom_command(
  OUTPUT "${compiled}"
  COMMAND "${Python_EXECUTABLE}" -m grpc_tools.protoc "--proto_path=${CMAKE_CURRENT_SOURCE_DIR}/cvmk/serving" "--descriptor_set_out=${compiled}" "${protocol}"
  DEPENDS "${protocol}"
  VERBATIM)
add_custom_target(cvmk_protocol ALL DEPENDS "${compiled}")
install(FILES "${compiled}" DESTINATION cvmk/serving)
