# What is installed: the two headers, the library, kvexport_self_test, and the package that find_package(kvexport) reads, which
# holds no path of this machine. ONNX Runtime is looked for beside the library, then where it was when this was built.
include(CMakePackageConfigHelpers)

set(package ${CMAKE_INSTALL_LIBDIR}/cmake/kvexport)
set_target_properties(kvexport PROPERTIES INSTALL_RPATH "$ORIGIN" INSTALL_RPATH_USE_LINK_PATH ON)
file(RELATIVE_PATH from_bin ${CMAKE_INSTALL_FULL_BINDIR} ${CMAKE_INSTALL_FULL_LIBDIR})
set_target_properties(kvexport_self_test PROPERTIES INSTALL_RPATH "$ORIGIN/${from_bin}" INSTALL_RPATH_USE_LINK_PATH ON)

install(TARGETS kvexport kvexport_self_test EXPORT kvexport)
install(DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR}/include/kvexport DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
