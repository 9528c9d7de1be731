"""Names as people may see them."""

from __future__ import annotations

from exporter.untrusted_text import clean_name


def test_names_of_people_stay_as_they_are() -> None:
    assert clean_name("שרת-בית Käse 日本 😀") == "שרת-בית Käse 日本 😀"
    assert clean_name("a\u202eb\x00\U000e0001\udc80") == "a\\u202eb\\u0000\\U000e0001�"
    assert clean_name("Việt" + "o\u0335\u0322\u0327\u0335\u0322") == "Việt" + "o\u0335\u0322\u0327\u0335\\u0322"
    assert len(clean_name("x" * 10_000)) == 121
    assert clean_name("a" + "\u0e47" * 6) == "a" + "\u0e47" * 4 + "\\u0e47" * 2  # marks of no combining class
    assert clean_name("\u3164\u115f\u2800") == "\\u3164\\u115f\\u2800"  # letters that are not seen
