# Compiler options of all targets here. They are private, so applications are not affected.
function(kvexport_flags target)
  target_compile_options(${target} PRIVATE -Wall -Wextra)
  if(KVEXPORT_WARNINGS)
    # GCC's -Wshadow also warns about constructor parameters with the name of a member; Clang's does not.
    target_compile_options(${target} PRIVATE -Wpedantic -Wconversion -Werror
      $<IF:$<CXX_COMPILER_ID:GNU>,-Wshadow=local,-Wshadow>)
  endif()
  if(KVEXPORT_SANITIZE)
    string(REPLACE ";" "," sanitizers "${KVEXPORT_SANITIZE}")
    target_compile_options(${target} PRIVATE -fsanitize=${sanitizers} -fno-sanitize-recover=all -fno-omit-frame-pointer)
    target_link_options(${target} PRIVATE -fsanitize=${sanitizers})
  endif()
endfunction()
