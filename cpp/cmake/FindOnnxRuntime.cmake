# Defines OnnxRuntime::OnnxRuntime: the library and the headers of its C API, from ONNXRUNTIME_ROOT or the system.
# ONNXRUNTIME_ROOT may be an unpacked release archive, a prefix with Debian's layout, or the output of
# cpp/tools/fetch_onnxruntime.sh; with ONNXRUNTIME_INCLUDE also the `capi` directory of the Python package.
set(ONNXRUNTIME_ROOT "$ENV{ONNXRUNTIME_ROOT}" CACHE PATH "Folder with the include and lib directories of ONNX Runtime")

find_path(ONNXRUNTIME_INCLUDE onnxruntime_c_api.h
  HINTS ${ONNXRUNTIME_ROOT}
  PATH_SUFFIXES include include/onnxruntime include/onnxruntime/core/session onnxruntime onnxruntime/core/session)
file(GLOB found LIST_DIRECTORIES false ${ONNXRUNTIME_ROOT}/libonnxruntime.so.1* ${ONNXRUNTIME_ROOT}/lib/libonnxruntime.so.1*)
set(names libonnxruntime.so libonnxruntime.so.1)
foreach(path ${found})
  get_filename_component(name ${path} NAME)
  list(APPEND names ${name})
endforeach()
find_library(ONNXRUNTIME_LIBRARY NAMES ${names} HINTS ${ONNXRUNTIME_ROOT} PATH_SUFFIXES lib lib64)
mark_as_advanced(ONNXRUNTIME_INCLUDE ONNXRUNTIME_LIBRARY)

set(ONNXRUNTIME_API 0)
if(ONNXRUNTIME_INCLUDE)
  file(STRINGS ${ONNXRUNTIME_INCLUDE}/onnxruntime_c_api.h line REGEX "^#define ORT_API_VERSION [0-9]+")
  string(REGEX REPLACE "[^0-9]" "" ONNXRUNTIME_API "${line}")
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(OnnxRuntime
  REQUIRED_VARS ONNXRUNTIME_INCLUDE ONNXRUNTIME_LIBRARY
  REASON_FAILURE_MESSAGE "pass -DONNXRUNTIME_ROOT=FOLDER, where FOLDER has include/onnxruntime_c_api.h and \
lib/libonnxruntime.so: an unpacked release archive of ONNX Runtime 1.28 or later, or the output of \
cpp/tools/fetch_onnxruntime.sh FOLDER.")
if(OnnxRuntime_FOUND AND ONNXRUNTIME_API LESS 21)
  message(FATAL_ERROR "The ONNX Runtime headers in ${ONNXRUNTIME_INCLUDE} must have API version 21 or later, got "
                      "${ONNXRUNTIME_API}. Pass another -DONNXRUNTIME_ROOT=FOLDER.")
endif()
if(OnnxRuntime_FOUND AND NOT TARGET OnnxRuntime::OnnxRuntime)
  add_library(OnnxRuntime::OnnxRuntime SHARED IMPORTED)
  set_target_properties(OnnxRuntime::OnnxRuntime PROPERTIES
    IMPORTED_LOCATION ${ONNXRUNTIME_LIBRARY} INTERFACE_INCLUDE_DIRECTORIES ${ONNXRUNTIME_INCLUDE})
endif()
