# What is installed: the two headers, the library, kvexport_self_test, and the package that find_package(kvexport) reads, which
# holds no path of this machine. ONNX Runtime is looked for beside the library, then where it was when this was built.
include(CMakePackageConfigHelpers)

set(package ${CMAKE_INSTALL_LIBDIR}/cmake/kvexport)
set(installed kvexport)
if(TARGET kvexport_self_test)
  list(APPEND installed kvexport_self_test)
endif()
set_target_properties(kvexport PROPERTIES INSTALL_RPATH "$ORIGIN" INSTALL_RPATH_USE_LINK_PATH ON)
if(TARGET kvexport_self_test)
  set_target_properties(kvexport_self_test PROPERTIES INSTALL_RPATH "$ORIGIN/../${CMAKE_INSTALL_LIBDIR}"
                                                      INSTALL_RPATH_USE_LINK_PATH ON)
endif()
install(TARGETS kvexport EXPORT kvexport)
if(TARGET kvexport_self_test)
  install(TARGETS kvexport_self_test)
endif()
install(DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR}/include/kvexport DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
