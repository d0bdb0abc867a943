"""Captioned pictures: reading, checking and preparing them."""

from pathlib import Path

SAMPLE = Path(__file__).parent / "sample" / "sample.parquet"  # 324 pictures that ship with the package
