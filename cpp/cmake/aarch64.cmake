# CMake toolchain file: cross-compiles for Linux on aarch64 (a Jetson, for example) with the compiler of the package
# g++-aarch64-linux-gnu.
#
#   cmake -S cpp -B BUILD --toolchain cpp/cmake/aarch64.cmake -DAARCH64_ROOT=FOLDER
#
# AARCH64_ROOT is the output of cpp/tools/fetch_aarch64.sh. Without it, pass -DCMAKE_SYSROOT=FOLDER with the board's libraries
# and headers, and -DONNXRUNTIME_ROOT=FOLDER with ONNX Runtime for aarch64.
set(AARCH64_ROOT "" CACHE PATH "Output of cpp/tools/fetch_aarch64.sh")
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES AARCH64_ROOT)

set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)

if(AARCH64_ROOT)
  set(CMAKE_SYSROOT "${AARCH64_ROOT}/sysroot")
  set(CMAKE_CROSSCOMPILING_EMULATOR "${AARCH64_ROOT}/bin/run")
  if(NOT ONNXRUNTIME_ROOT)
    set(ONNXRUNTIME_ROOT "${AARCH64_ROOT}/onnxruntime" CACHE PATH "Folder with the include and lib directories of ONNX Runtime")
  endif()
endif()

# Headers and libraries come from the sysroot or from folders that the command names, never from this machine's own.
list(APPEND CMAKE_FIND_ROOT_PATH ${ONNXRUNTIME_ROOT} ${TENSORRT_ROOT} $ENV{CUDA_HOME})
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE BOTH)  # applications find kvexport in CMAKE_PREFIX_PATH
