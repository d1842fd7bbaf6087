"""A chat in a terminal: one conversation in one cache. Usage: python chat.py BUNDLE [SYSTEM]"""

import sys

import kvexport

with kvexport.open(sys.argv[1]) as session:
    cache = session.new_cache()
    for line in sys.stdin:
        if cache.lengths[0] + len(session.encode(line)) + 64 > session.capacity:  # 64: template and answer
            cache.clear()
        system = sys.argv[2] if len(sys.argv) > 2 and not cache.lengths.any() else None
        prompt = session.turn(line.rstrip("\n"), system=system, cache=cache)
        for piece in session.stream(prompt, cache=cache):
            print(piece, end="", flush=True)
        print()
