# Compiler options of everything that is built here; nothing of it reaches who uses the library.
function(kvexport_flags target)
  target_compile_options(${target} PRIVATE -Wall -Wextra)
  if(KVEXPORT_WARNINGS)
    # GCC's plain -Wshadow also refuses a constructor's parameter that has its member's name; Clang's does not.
    target_compile_options(${target} PRIVATE -Wpedantic -Wconversion -Werror
      $<IF:$<CXX_COMPILER_ID:GNU>,-Wshadow=local,-Wshadow>)
  endif()
  if(KVEXPORT_SANITIZE)
    string(REPLACE ";" "," sanitizers "${KVEXPORT_SANITIZE}")
    target_compile_options(${target} PRIVATE -fsanitize=${sanitizers} -fno-sanitize-recover=all -fno-omit-frame-pointer)
    target_link_options(${target} PRIVATE -fsanitize=${sanitizers})
  endif()
endfunction()
