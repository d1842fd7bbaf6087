"""Prefill a long prompt once, then load its cache: restart.py BUNDLE PROMPT_FILE CACHE_FILE QUESTION"""

import sys
from pathlib import Path

import kvexport

bundle, prompt, saved, question = sys.argv[1:]
with kvexport.open(bundle) as session:
    if Path(saved).exists():
        cache = session.load(saved)
    else:
        cache = session.new_cache()
        session.prefill(Path(prompt).read_text(encoding="utf-8"), cache=cache)
        cache.save(saved)
    print(session.generate(question, cache=cache).text)
