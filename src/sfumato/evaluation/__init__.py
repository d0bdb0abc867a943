"""How good pictures are, in figures that can be trusted and repeated; nothing below imports this room.

bootstrap.py   intervals
distances.py   Fréchet distance, KID, precision and recall of two sets of features
cache.py       results on disk by content hash
extractors.py  pictures → features, by packaged networks
judge.py       caption retrieval by a small CLIP trained on real pictures only
truth.py       real pictures: which captions are drawn, what they are compared with
generate.py    a model's pictures for captions, resumable
measure.py     the figures of a set of pictures; ``evaluate``
report.py      a figure with all that decided it; table, JSON
cli.py         ``sfumato evaluate``
"""
