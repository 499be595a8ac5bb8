"""Telling text from garbage, and the encodings of text files apart."""

import random

import pytest

from mmrag.reading.encodings import NotText, UnknownEncoding, decode
from mmrag.reading.legibility import garbled_lines, has_words, lost_share

SENTENCES = {
    "English": "The cooling unit must be replaced every eighteen months by trained staff.",
    "German": "Die Kündigungsfrist beträgt drei Monate. Für Mitglieder gelten ermäßigte Gebühren.",
    "French": "Les congés payés s'élèvent à vingt-cinq jours ouvrés par année de travail complète.",
    "Polish": "Urlop przysługuje po sześciu miesiącach pracy. Klucz wisi w kuchni za drzwiami.",
    "Vietnamese": "Chìa khóa treo trong bếp sau cánh cửa. Hội phí là năm trăm nghìn đồng mỗi năm.",
    "Finnish": "Vuosimaksu on viisikymmentä euroa, ja avain on keittiössä oven takana.",
    "Turkish": "Yıllık izin altı ay sonra verilir. Anahtar mutfakta kapının arkasında asılıdır.",
    "Russian": "Ключ от сарая висит на кухне за дверью. Взнос составляет 500 рублей в год.",
    "Greek": "Το κλειδί κρέμεται στην κουζίνα πίσω από την πόρτα, και η συνδρομή είναι πενήντα.",
    "Hebrew": "המפתח תלוי במטבח מאחורי הדלת ודמי החבר הם חמישים שקלים לשנה בלבד.",
    "Arabic": "المفتاح معلق في المطبخ خلف الباب ورسوم العضوية خمسون دينارا في السنة.",
    "Chinese": "钥匙挂在厨房的门后面。会费每年五百元,请在三月底前缴纳。",
    "Japanese": "鍵は台所のドアの後ろに掛かっています。会費は年に五千円です。",
    "Korean": "열쇠는 부엌 문 뒤에 걸려 있습니다. 회비는 일 년에 오만 원입니다.",
    "Thai": "กุญแจแขวนอยู่ในครัวหลังประตู ค่าสมาชิกปีละห้าสิบบาท",
    "codes": "Item XR-2000/B (FY2015, Q3): 1,250.50 EUR, see https://example.org/a?b=c#d, JPY, kWh",
    "names": "McDonald's, PowerPoint, YouTube, iPhone 15, eBook, PepsiCo, O'Brien-Smith",
}
UKRAINIAN = "Ключ від сараю висить на кухні за дверима."


def shifted(text: str, by: int, first: int = 33, count: int = 94) -> str:
    """Each character of a range replaced by the one some places on, as by a wrong font map."""
    return "".join(
        chr(first + (ord(c) - first + by) % count) if first <= ord(c) < first + count else c
        for c in text
    )


@pytest.mark.parametrize("language", SENTENCES)
def test_text_of_any_language_is_legible(language) -> None:
    text = SENTENCES[language]
    assert garbled_lines([text]) == set()
    assert has_words(text)


@pytest.mark.parametrize("by", [1, 3, 15, 60, 65])  # 65: by glyph numbers, 29 less than the codes
@pytest.mark.parametrize("language", ["English", "German", "French", "Finnish", "Turkish"])
def test_text_with_shifted_codes_is_garbled(language, by) -> None:
    text = SENTENCES[language].casefold()
    lines = [SENTENCES["English"], shifted(SENTENCES[language], by), shifted(text, by)]
    assert garbled_lines(lines) == {1, 2}


def test_the_code_of_a_program_and_addresses_are_legible() -> None:
    lines = [
        "    def from_pretrained(cls, modelName: str, **kwargs) -> LocalModel:",
        "        self.hidden_size = getattr(config, 'hidden_size', maxValue)",
        "See https://example.org/xq/zwk?q=1&x=2#kjx or write to xkq.zw@example.org",
    ]
    assert garbled_lines(lines) == set()


LISTINGS = {
    "C": """static PyObject *CPyBytes_GetItem(PyObject *o, CPyTagged index) {
if (CPyTagged_CheckShort(index)) {
Py_ssize_t n = CPyTagged_ShortAsSsize_t(index);
Py_ssize_t size = ((PyVarObject *)o)->ob_size;
if (n < 0) n += size; // counted from the end
if (n < 0 || n >= size) {
PyErr_SetString(PyExc_IndexError, "index out of range");
return CPY_INT_TAG; }
return num_to_tag(PyBytes_AS_STRING(o)[n]);""",
    "CUDA": """const int i = blockIdx.x * blockDim.x + threadIdx.x;
const int x = ((i%(N*b*b))%(b*b))/b;
const int y = ((i%(N*b*b))%(b*b))%b;
if (i >= n_rows) return; // past the last row
float total = 0; for (int k = 0; k < n_columns; ++k) {
total += weights[k] * rows[i*n_columns + k]; }
out[i] = total / max(n_columns, 1);""",
    "JavaScript": """const path = require("path");
const match = arg.match(/^--([^=]+)=([\\s\\S]*)$/);
const doubleDashIndex = args.indexOf("--");
// Everything behind two dashes is a value and no option.
if (match && !flags.bools[match[1]]) {
setArg(match[1], match[2], arg); // the value of an option
} else if (/^--no-.+/.test(arg)) {
setArg(arg.match(/^--no-(.+)/)[1], false, arg);
} else { argv._.push(flags.strings._ ? arg : Number(arg)); }
return Object.keys(options).filter((name) => name in defaults);""",
    "Perl": """use strict; use warnings;
my ($ix, $iy) = ($p[$j+1][0] - $p[$j][0], $p[$j+1][1]);
# Names of the hunks in the order of their lines
push @keys, map {&stringify($_) . "=>" . &stringify($v->{$_})} @k;
if ($in =~ m/^(0[0-7]*)$/s) { return oct($in); }
foreach my $name (sort keys %{$hunk->{"blocks"}}) {
print "The block $name has the lines $hunk->{$name}\\n" unless $seen{$name}++; }
$e =~ s/([^\\0]*)/'$1'/ unless $e =~ /^(?:-?[\\d.]+|\\*[\\w:]*)$/x;
return wantarray ? @found : scalar(@found);""",
    "Vim": """let tagpat='</\\=\\(\\k\\|[.:-]\\)\\+\\|/>'
if b:xml_namespace == 'DEFAULT' " no prefix is written
let start_tag = matchstr(getline('.'), tagpat)
call cursor(line('.'), col('.') - strlen(start_tag))
execute "nnoremap <silent> <buffer> ]m :call s:Jump('n', '" . b:next . "')<cr>"
endif""",
}


@pytest.mark.parametrize("language", LISTINGS)
def test_listings_of_programs_are_legible(language) -> None:
    assert garbled_lines(LISTINGS[language].splitlines()) == set()


@pytest.mark.parametrize("by", [1, 15, 65])
def test_garbled_lines_beside_a_listing_are_found(by) -> None:
    prose = [SENTENCES["English"]] * 30
    garbled = [shifted(SENTENCES["English"], by)] * 3
    lines = [*LISTINGS["C"].splitlines(), *prose, *garbled, *prose]
    assert garbled_lines(lines) == {39, 40, 41}


@pytest.mark.parametrize(
    "garbage",
    [
        shifted(SENTENCES["Russian"], 9, 0x410, 64),
        shifted(SENTENCES["Greek"], 5, 0x3B1, 25),
        f"{SENTENCES['Russian']} {UKRAINIAN}".encode("cp1251").decode(
            "cp1252"
        ),  # a font with Latin names
        shifted(
            SENTENCES["Chinese"] * 2 + "差旅费报销必须在三十天内提交给部门", 7000, 0x4E00, 20000
        ),
    ],
)
def test_other_scripts_are_judged_too(garbage) -> None:
    assert garbled_lines([garbage]) == {0}


def test_numbers_and_dots_are_neither_garbled_nor_words() -> None:
    assert garbled_lines(["12.5 % 1,234 (56) $ 78 . . . . . 9"] * 20) == set()
    assert not has_words(". , i l | - _ ; : ~ ! l i .")
    assert has_words("1,250 kg") and has_words("四 五 六")
    assert lost_share("a\ufffd\ufffd\ue123 ") == 0.75


ENCODINGS = [
    ("English", "The café’s menu costs £5 or €6 – see page 3", "cp1252"),
    ("German", None, "cp1252 cp850 mac_roman"),
    ("French", None, "cp1252 cp850 mac_roman iso8859_15"),
    ("Polish", None, "cp1250 iso8859_2"),
    ("Czech", "Klíč visí v kuchyni za dveřmi. Žádost podejte včas, děkujeme.", "cp1250"),
    ("Hungarian", "A szabadság hat hónap munka után jár. Köszönjük a fűtés díját.", "cp1250"),
    ("Turkish", None, "cp1254"),
    ("Lithuanian", "Atostogos suteikiamos po šešių mėnesių. Raktas kabo virtuvėje.", "cp1257"),
    ("Russian", None, "cp1251 koi8_r cp866 iso8859_5 mac_cyrillic"),
    ("Ukrainian", UKRAINIAN, "cp1251 koi8_u"),
    ("Greek", None, "cp1253 iso8859_7"),
    ("Hebrew", None, "cp1255 iso8859_8"),
    ("Arabic", None, "cp1256 iso8859_6"),
    ("Thai", None, "cp874"),
    ("Chinese", None, "gbk gb18030"),
    ("Chinese", "鑰匙掛在廚房的門後面。會費每年五百元,請在三月底前繳納。", "big5"),
    ("Japanese", None, "cp932 euc_jp iso2022_jp"),
    ("Korean", None, "cp949 euc_kr"),
]


@pytest.mark.parametrize(
    ("language", "text", "encoding"),
    [(name, text, one) for name, text, many in ENCODINGS for one in many.split()],
)
def test_texts_of_older_encodings_are_decoded(language, text, encoding) -> None:
    text = text or SENTENCES[language]
    assert decode(text.encode(encoding)) == text
    long = f"{text}\n" * 3000  # more than the sample that is looked at
    assert decode(long.encode(encoding)) == long


def test_what_may_be_of_several_encodings_is_refused() -> None:
    with pytest.raises(UnknownEncoding):
        decode("Årsavgiften är femhundra kronor".encode("mac_roman"))
    with pytest.raises((UnknownEncoding, NotText)):
        decode(random.Random(1).randbytes(3000).replace(b"\0", b"x"))


def test_no_short_text_is_decoded_wrongly() -> None:
    """A text with a few letters outside of ASCII is decoded, or refused."""
    dice = random.Random(7)
    decoded = 0
    for name, given, encodings in ENCODINGS:
        words = (given or SENTENCES[name]).split()
        for encoding in encodings.split():
            for _ in range(10):
                start = dice.randrange(len(words))
                text = " ".join(words[start : start + 6])
                if len({char for char in text if not char.isascii()}) < 4:
                    continue
                try:
                    assert decode(text.encode(encoding)) == text, encoding
                    decoded += 1
                except (UnknownEncoding, NotText):
                    continue
    assert decoded > 150
