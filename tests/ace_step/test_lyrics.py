"Lyrics become ids, whatever they are."
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from musiclab.ace_step import lyrics, spelling
from musiclab.ace_step.lyrics import LONGEST, LyricTokenizer, fetch_vocabulary, languages, open_lyric_tokenizer, tiny_vocabulary
from musiclab.ace_step.spelling import LANGUAGES, pinyin, romaji, romanized, say_chinese, spelled
from musiclab.core import MusiclabError, sha256


@pytest.fixture(scope="session")
def small(tmp_path_factory): return LyricTokenizer(tiny_vocabulary(tmp_path_factory.mktemp("lyrics") / "lyric_vocab.json"))


@pytest.fixture
def released(music): return open_lyric_tokenizer(music / "ace_step" / "lyric_vocab.json")


def test_structure_tags_have_ids_of_their_own(released):
    assert [released.line(f"[{tag}]", "en") for tag in lyrics.TAGS] == [[259, 6681 + number] for number in range(12)]
    assert released.line("[START]", "en") == [259, 6681]  # small letters, before it is looked up
    assert (released.start, released.end, released.pieces.get_vocab_size()) == (261, 2, 6693)
    assert released.line("[refrain]", "fr")[1] == 1  # spelled out, its bracket unknown
    assert released("[verse]\n\nla") == [261, 259, 6683, 2, 2, *released.line("la", "en"), 2]
    assert {released.line("la", language)[0] for language in LANGUAGES} == {
        259, 260, 262, 267, 284, 285, 286, 293, 294, 295, 297, 5022, 5023, 5412, 5753, 6152, 6680}


def test_the_pinned_content_is_that_of_the_test_data(music):
    assert sha256(music / "ace_step" / "lyric_vocab.json") == lyrics.CONTENT


@pytest.mark.parametrize("text, found", [
    ("Neon lights they flicker bright\nOh", "en en"), ("[verse]\nBajo la luna llena\nOye baby", "en es es"),
    ("La nuit est belle\n夜空に星が\n밤하늘에 별이", "fr ja ko"), ("[lang:it]\nLa la\n[lang: fr ] la la\nLa\n[lang:]\nYou and me", "it fr it en"),
    ("[lang:zh-CN] 你好", "zh"), ("", "en"), ("12 34", "en"), ("Hello 世界\r\nwe are here", "zh en")])
def test_languages(text, found): assert [line.language for line in languages(text)] == found.split()


def test_a_language_that_the_model_never_heard(small):
    with pytest.raises(MusiclabError, match=r"\[lang:sv\].* Choose one of en, de"): small("[lang:sv]\nNatten är mörk")
    assert len(small("Natten är mörk och stjärnorna lyser")) > 10  # not asked for by name: sung as its nearest neighbour


def test_empty_and_endless_lyrics(small):
    assert small("") == small(" \n\n ") == []
    with pytest.warns(UserWarning, match="are cut off"):
        assert len(small("night and day " * 2000)) == LONGEST
        assert len(small("é" * 10_000)) == LONGEST


@settings(max_examples=80, deadline=None)
@given(st.lists(st.text(max_size=30) | st.text("0123456789.,$£€%-/ºa年月٣½²th[]: ", max_size=20), max_size=4))
def test_any_text_becomes_ids(small, texts):
    try: ids = small("\n".join(texts))
    except MusiclabError as error: assert "does not know this language" in error.what
    else: assert all(0 <= id < small.pieces.get_vocab_size() for id in ids)


@settings(max_examples=120, deadline=None)
@given(st.text(max_size=20) | st.text("0123456789.,$£€%-/º年月 stde", max_size=20), st.sampled_from(LANGUAGES))
def test_any_text_can_be_spelled(text, language): assert '"' not in spelled(text, language) or language in ("ja", "ko")


@pytest.mark.parametrize("language, text, said", [
    ("en", "$1,234.50 & 3rd", "one thousand, two hundred and thirty-four dollars, fifty cents and third"),
    ("en", "$1.2.3", "dollar one point two.three"),
    ("de", "Dr. Faust, 1. Akt", "doktor faust, erste akt"),
    ("fr", "2e étage, 14°", "deuxième étage, quatorze degrés"), ("ru", "г-н 1,000", "господин одна тысяча"),
    ("nl", "3 uur", "drie uur"), ("tr", "ÜÇ İnci, %5", "üç inci, yüzde beş"),
    ("cs", "1. den", "jedna. den"), ("pt", "100%", "cem por cento"), ("ko", "2번째", "du beon-jjae")])
def test_spelling(language, text, said): assert spelled(text, language) == said


@pytest.mark.parametrize("text, said", [
    ("1949年10月1日", "一九四九年十月一日"), ("2个", "二个"), ("200元", "两百元"), ("22", "二十二"),
    ("220块", "两百二十块"), ("3/4", "四分之三"), ("13800138000", "一三八零零一三八零零零"),
    ("1234", "一二三四"), ("1234个", "一千两百三十四个"), ("0.5%", "百分之零点五"),
    ("10000人", "一零零零零人"), ("10000个", "一万个"), ("b2b", "b2b"), ("（好）！", ",好,,")])
def test_chinese_numbers(text, said): assert say_chinese(text) == said


@pytest.mark.parametrize("speak, package", [(pinyin, "pypinyin"), (romanized, "hangul-romanize"), (romaji, "cutlet")])
def test_a_missing_library_is_named(speak, package, monkeypatch):
    def absent(name): raise ModuleNotFoundError(name)
    monkeypatch.setattr(spelling, "import_module", absent)
    monkeypatch.setattr(spelling, "_cutlet", spelling._cutlet.__wrapped__)  # not the one that was kept
    with pytest.raises(MusiclabError, match=f"need the package {package}.*musiclab\\[lyrics\\]"): speak("x")


def test_the_vocabulary_is_fetched_once_and_believed_if_it_is_the_right_one(small, tmp_path, monkeypatch):
    data, asked = small.pieces.to_str().encode(), []
    monkeypatch.setenv("MUSICLAB_HOME", str(tmp_path))
    monkeypatch.setattr(lyrics, "urlopen", lambda address, timeout: asked.append(address) or io.BytesIO(data))
    with pytest.raises(MusiclabError, match="not the lyric vocabulary of ACE-Step"): fetch_vocabulary()
    assert not list(tmp_path.rglob("*.json"))
    monkeypatch.setattr(lyrics, "CONTENT", sha256(data))
    assert fetch_vocabulary() == fetch_vocabulary() and asked == [lyrics.ADDRESS] * 2
    assert open_lyric_tokenizer(tmp_path)("la") == small("la")
    fetch_vocabulary().write_text("damaged")
    assert sha256(fetch_vocabulary()) == sha256(data)  # once more


def test_without_a_network(tmp_path, monkeypatch):
    def offline(*_, **__): raise OSError("no route to host")
    monkeypatch.setenv("MUSICLAB_HOME", str(tmp_path))
    monkeypatch.setattr(lyrics, "urlopen", offline)
    with pytest.raises(MusiclabError, match="no route to host.*lyric_vocab.json into the checkpoint's folder"): open_lyric_tokenizer()


@pytest.mark.parametrize("content", ["", "{}", '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'])
def test_a_file_that_is_no_vocabulary(content, tmp_path):
    (tmp_path / "some.json").write_text(content)
    with pytest.raises(MusiclabError, match="not a lyric vocabulary"): open_lyric_tokenizer(tmp_path / "some.json")
