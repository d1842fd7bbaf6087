# Defines TensorRT::TensorRT: libnvinfer, NvInfer.h and the CUDA headers that it includes, from TENSORRT_ROOT and CUDA_HOME
# or the system directories of JetPack and the SDK.
set(TENSORRT_ROOT "$ENV{TENSORRT_ROOT}" CACHE PATH "Folder with the include and lib directories of TensorRT")
set(arch ${CMAKE_SYSTEM_PROCESSOR}-linux-gnu)

find_path(TENSORRT_INCLUDE NvInfer.h HINTS ${TENSORRT_ROOT} PATH_SUFFIXES include include/${arch})
find_library(TENSORRT_LIBRARY nvinfer HINTS ${TENSORRT_ROOT} PATH_SUFFIXES lib lib64 lib/${arch} targets/${arch}/lib)
find_path(TENSORRT_CUDA_INCLUDE cuda_runtime_api.h HINTS $ENV{CUDA_HOME} $ENV{CUDA_PATH} /usr/local/cuda
  PATH_SUFFIXES include targets/${CMAKE_SYSTEM_PROCESSOR}-linux/include)
mark_as_advanced(TENSORRT_INCLUDE TENSORRT_LIBRARY TENSORRT_CUDA_INCLUDE)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TensorRT REQUIRED_VARS TENSORRT_LIBRARY TENSORRT_INCLUDE TENSORRT_CUDA_INCLUDE)
if(TensorRT_FOUND AND NOT TARGET TensorRT::TensorRT)
  add_library(TensorRT::TensorRT UNKNOWN IMPORTED)
  set_target_properties(TensorRT::TensorRT PROPERTIES IMPORTED_LOCATION ${TENSORRT_LIBRARY}
    INTERFACE_INCLUDE_DIRECTORIES "${TENSORRT_INCLUDE};${TENSORRT_CUDA_INCLUDE}")
endif()
