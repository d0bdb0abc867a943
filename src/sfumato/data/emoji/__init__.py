"""The corpus of emoji, rebuilt from public packages: drawings by Iconify's sets, names and tags by emojibase.

packages.py  npm packages of pinned version and checked integrity
names.py     drawings' names and code points → emoji
build.py     drawings → rows, splits, one parquet file
"""
