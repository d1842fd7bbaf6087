# Installs the headers, the library, kvexport_self_test, and a relocatable package for find_package(kvexport). At run time
# ONNX Runtime is searched for beside the library, then where it was at build time.
include(CMakePackageConfigHelpers)

set(package ${CMAKE_INSTALL_LIBDIR}/cmake/kvexport)
file(RELATIVE_PATH from_bin ${CMAKE_INSTALL_FULL_BINDIR} ${CMAKE_INSTALL_FULL_LIBDIR})
set_target_properties(kvexport PROPERTIES INSTALL_RPATH "$ORIGIN" INSTALL_RPATH_USE_LINK_PATH ON)
set_target_properties(kvexport_self_test PROPERTIES INSTALL_RPATH "$ORIGIN/${from_bin}" INSTALL_RPATH_USE_LINK_PATH ON)

install(TARGETS kvexport EXPORT kvexport)
install(TARGETS kvexport_self_test)
install(DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR}/include/kvexport DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT kvexport FILE kvexportTargets.cmake NAMESPACE kvexport:: DESTINATION ${package})
configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/kvexportConfig.cmake.in kvexportConfig.cmake
  INSTALL_DESTINATION ${package})
write_basic_package_version_file(kvexportConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/kvexportConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/kvexportConfigVersion.cmake
  DESTINATION ${package})
if(NOT BUILD_SHARED_LIBS)
  install(FILES ${CMAKE_CURRENT_LIST_DIR}/FindOnnxRuntime.cmake ${CMAKE_CURRENT_LIST_DIR}/FindTensorRT.cmake
    DESTINATION ${package})
endif()
