"""A needle test: pages, figures and parts of pictures with something unique, hidden among others.

It needs no questions of a person: what is hidden is known, so is what finds it. After Needle in a
Haystack and its multimodal form, MMNeedle (arXiv 2406.11230).
"""
