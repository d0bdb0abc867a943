"""Captioned pictures: reading, checking and preparing them. Knows no network and no diffusion.

config.py    which pictures, at which size, with which words
sources.py   folder, metadata.jsonl, parquet, tar shards, IDX → records
captions.py  the words of a record, written anew at every visit
pictures.py  records at training size behind one random-access index
check.py     what ``sfumato data check`` counts and draws
emoji/       how ``sfumato data prepare`` rebuilds the corpus from public packages
sample/      324 pictures that ship with the package
"""
