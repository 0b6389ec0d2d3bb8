"ACE-Step's lyrics: spelling and ids line by line; ids of whole songs where the languages found are the same."
import json
import os
from collections.abc import Iterator
from pathlib import Path

from musiclab.ace_step.lyrics import FILE, LyricTokenizer, languages
from musiclab.ace_step.spelling import spelled
from tests.parity.rows import Case, Row


def vocabulary(case: Case) -> Path | None:
    "The release's vocabulary: in the folder of test data, else in the folder `data` beside that of the cases."
    places = [Path(place) for place in [os.environ.get("MUSICLAB_TEST_DATA")] if place] + [case.folder.resolve().parents[2] / "data"]
    return next((place / "ace_step" / FILE for place in places if (place / "ace_step" / FILE).is_file()), None)


def lyric_tokenizer(case: Case) -> Iterator[Row]:
    songs = json.loads((case.folder / "lyrics.json").read_text(encoding="utf-8"))["lyrics"]
    file = vocabulary(case)
    tokenizer = file and LyricTokenizer(file)
    for number, song in enumerate(songs):
        sung = [line for line in song["lines"] if "ids" in line]
        name = f"song {number} ({song['nominal_language']})"
        wrong = sum(spelled(line["line"].strip(), line["language_used"]) != line["preprocessed"].strip() for line in sung)
        yield Row(case.folder.name, f"{name}: spelling", wrong, "exact", not wrong)
        if not tokenizer: continue  # without the release's vocabulary there are no ids to compare
        wrong = sum(tokenizer.line(line["line"].strip(), line["language_used"]) != line["ids"] for line in sung)
        yield Row(case.folder.name, f"{name}: ids of {len(sung)} lines", wrong, "exact", not wrong)
        found = list(languages(song["lyrics"]))
        if all(ours.language == theirs["detected"] for ours, theirs in zip(found, song["lines"]) if ours.text and not ours.text.startswith("[")):
            ids = tokenizer(song["lyrics"])
            yield Row(case.folder.name, f"{name}: ids of the song", float(ids != song["pipeline_ids"]), "exact", ids == song["pipeline_ids"])
