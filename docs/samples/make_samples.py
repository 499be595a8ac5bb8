"""Make the sample PDFs of the demo: the papers of a small community garden.

    python docs/samples/make_samples.py OUT_DIR

Four files, eleven pages: a handbook (prose and a table), a season report (charts and a
table), a planting guide (a calendar and a drawing) and a scanned letter without a text layer.
``questions.json`` beside this script asks about them. The same bytes come out each time with
the same versions of PyMuPDF and Pillow. All names and numbers are made up.
"""

from __future__ import annotations

import calendar
import io
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import pymupdf
from PIL import Image, ImageFilter

A4 = pymupdf.paper_rect("a4")
LEFT, RIGHT, TOP, BOTTOM = 64.0, A4.width - 64.0, 84.0, A4.height - 72.0
INK, GREEN, LEAF, SAND = (
    (0.16, 0.18, 0.17),
    (0.13, 0.37, 0.24),
    (0.55, 0.72, 0.4),
    (0.96, 0.94, 0.88),
)
CLAY, SKY, SUN, GREY = (
    (0.76, 0.41, 0.25),
    (0.32, 0.55, 0.71),
    (0.93, 0.73, 0.26),
    (0.62, 0.64, 0.62),
)
WHITE, FAINT = (1.0, 1.0, 1.0), (0.86, 0.87, 0.85)
GARDEN = "Millbrook Community Garden"
DATE = "D:20250101120000Z"


class Sheet:
    """A document that is filled from top to bottom; ``y`` is where the next block begins."""

    def __init__(self, title: str) -> None:
        self.document = pymupdf.open()
        self.title = title
        self.outline: list[list[object]] = []
        self.y = TOP

    def page(self) -> None:
        """Begin a page with its header and number."""
        self.paper = self.document.new_page(width=A4.width, height=A4.height)
        self.y = TOP
        number = len(self.document)
        self.paper.draw_line((LEFT, 56), (RIGHT, 56), color=LEAF, width=0.8)
        self._line(LEFT, 48, f"{GARDEN}  -  {self.title}", 8.5, GREY)
        self._line(A4.width / 2 - 4, A4.height - 36, str(number), 9, GREY)

    def _line(
        self, x: float, y: float, text: str, size: float, color: Sequence[float] = INK,
        font: str = "helv",
    ) -> None:  # fmt: skip
        self.paper.insert_text((x, y), text, fontsize=size, fontname=font, color=color)

    def _centred(
        self, x: float, y: float, text: str, size: float, color: Sequence[float] = INK
    ) -> None:
        width = pymupdf.get_text_length(text, "helv", size)
        self._line(x - width / 2, y, text, size, color)

    def heading(self, text: str, level: int = 1) -> None:
        """A heading, which also goes into the outline."""
        size = 20 if level == 1 else 13.5
        self.y += 6 if self.y == TOP else 12
        self.outline.append([level, text, len(self.document), pymupdf.Point(LEFT, self.y)])
        self._line(LEFT, self.y + size, text, size, GREEN, "hebo")
        self.y += size + 12

    def prose(self, text: str, size: float = 10.5, font: str = "tiro", indent: float = 0) -> None:
        """A paragraph, broken into lines."""
        size += 1 if font == "tiro" else 0
        line = ""
        for word in [*text.split(), ""]:
            longer = f"{line} {word}".strip()
            if word and pymupdf.get_text_length(longer, font, size) <= RIGHT - LEFT - indent:
                line = longer
                continue
            self._line(LEFT + indent, self.y + size, line, size, INK, font)
            self.y += size * 1.42
            line = word
        self.y += size * 0.6

    def points(self, items: Sequence[str]) -> None:
        """A list with leaf-green dots."""
        for item in items:
            self.paper.draw_circle((LEFT + 8, self.y + 7), 2, color=None, fill=LEAF)
            self.prose(item, indent=20)
            self.y -= 3
        self.y += 6

    def caption(self, text: str) -> None:
        """A line below a table or figure."""
        self.prose(text, 9, "heit")
        self.y += 8

    def table(self, rows: Sequence[Sequence[str]], widths: Sequence[float]) -> None:
        """A table whose first row is its head. widths: shares of the text's width."""
        high = 21.0
        for number, row in enumerate(rows):
            x = LEFT
            fill = GREEN if number == 0 else SAND if number % 2 else WHITE
            strip = pymupdf.Rect(LEFT, self.y, RIGHT, self.y + high)
            self.paper.draw_rect(strip, color=None, fill=fill)
            for cell, share in zip(row, widths, strict=True):
                font, color = ("hebo", WHITE) if number == 0 else ("helv", INK)
                self._line(x + 7, self.y + 14, cell, 9.5, color, font)
                x += share * (RIGHT - LEFT)
            self.y += high
        self.paper.draw_line((LEFT, self.y), (RIGHT, self.y), color=GREEN, width=1)
        self.y += 8

    def bars(self, values: dict[str, float], unit: str, step: float) -> None:
        """A bar chart with values above its bars."""
        x0, base, high = LEFT + 36, self.y + 190, 170.0
        top = math.ceil(max(values.values()) / step) * step
        self._line(LEFT, self.y + 6, unit, 8.5, GREY)
        for i in range(round(top / step) + 1):
            y = base - i * step / top * high
            self.paper.draw_line((x0, y), (RIGHT, y), color=FAINT, width=0.6)
            self._line(LEFT, y + 3, f"{i * step:g}", 8.5, GREY)
        wide = (RIGHT - x0) / len(values)
        for i, (name, value) in enumerate(values.items()):
            x, y = x0 + (i + 0.5) * wide, base - value / top * high
            bar = pymupdf.Rect(x - wide * 0.3, y, x + wide * 0.3, base)
            self.paper.draw_rect(bar, color=None, fill=(LEAF, SUN, CLAY, SKY)[i % 4])
            self._centred(x, y - 4, f"{value:g}", 8.5)
            self._centred(x, base + 13, name, 8.5)
        self.y = base + 24

    def curves(
        self, months: Sequence[str], series: dict[str, Sequence[float]], step: float
    ) -> None:
        """A line chart with a legend."""
        x0, base, high = LEFT + 36, self.y + 190, 170.0
        top = math.ceil(max(max(v) for v in series.values()) / step) * step
        wide = (RIGHT - x0) / len(months)
        for i in range(round(top / step) + 1):
            y = base - i * step / top * high
            self.paper.draw_line((x0, y), (RIGHT, y), color=FAINT, width=0.6)
            self._line(LEFT, y + 3, f"{i * step:g}", 8.5, GREY)
        for i, month in enumerate(months):
            self._centred(x0 + (i + 0.5) * wide, base + 13, month, 8.5)
        for n, (name, values) in enumerate(series.items()):
            color = (SKY, CLAY)[n]
            spots = [(x0 + (i + 0.5) * wide, base - v / top * high) for i, v in enumerate(values)]
            self.paper.draw_polyline(spots, color=color, width=2)
            for spot in spots:
                self.paper.draw_circle(spot, 2.6, color=color, fill=WHITE, width=1.4)
            self.paper.draw_line(
                (x0 + n * 130, base + 30), (x0 + 20 + n * 130, base + 30), color=color, width=2
            )
            self._line(x0 + 26 + n * 130, base + 33, name, 8.5)
        self.y = base + 46

    def calendar(self, crops: dict[str, tuple[float, float, float]]) -> None:
        """Crops against months: when to sow (sand) and to harvest (green); numbers are months."""
        x0, row = LEFT + 92, 24.0
        wide = (RIGHT - x0) / 12
        for i, month in enumerate(calendar.month_abbr[1:]):
            self._centred(x0 + (i + 0.5) * wide, self.y + 8, month, 8.5, GREY)
        top = self.y + 16
        for i in range(13):
            x = x0 + i * wide
            self.paper.draw_line((x, top), (x, top + row * len(crops)), color=FAINT, width=0.5)
        for n, (name, (sow, pick, end)) in enumerate(crops.items()):
            y = top + n * row
            self._line(LEFT, y + 15, name, 10)
            self.paper.draw_line((LEFT, y + row), (RIGHT, y + row), color=FAINT, width=0.5)
            for start, stop, color in ((sow, sow + 1.5, SUN), (pick, end, GREEN)):
                bar = pymupdf.Rect(x0 + (start - 1) * wide, y + 6, x0 + (stop - 1) * wide, y + 18)
                self.paper.draw_rect(bar, color=None, fill=color, radius=0.4)
        self.y = top + row * len(crops) + 12
        for i, (name, color) in enumerate((("sow", SUN), ("harvest", GREEN))):
            x = x0 + i * 90
            self.paper.draw_rect(
                pymupdf.Rect(x, self.y, x + 18, self.y + 8), color=None, fill=color
            )
            self._line(x + 24, self.y + 8, name, 8.5)
        self.y += 18

    def picture(self, image: Image.Image, width: float) -> None:
        """A picture in the middle of the text's width."""
        data = io.BytesIO()
        image.save(data, "PNG")
        high = width * image.height / image.width
        x = (A4.width - width) / 2
        self.paper.insert_image(
            pymupdf.Rect(x, self.y, x + width, self.y + high), stream=data.getvalue()
        )
        self.y += high + 8

    def bed(self) -> None:
        """A drawing of a raised bed, with its layers named."""
        layers = [
            ("branches and twigs, 15 cm", CLAY),
            ("leaves and turf, 15 cm", (0.5, 0.42, 0.3)),
            ("half-rotten compost, 20 cm", (0.36, 0.28, 0.2)),
            ("garden soil, 20 cm", (0.24, 0.18, 0.14)),
        ]
        x0, x1, y = LEFT + 40, LEFT + 270, self.y + 196
        for number, (name, color) in enumerate(layers):
            high = 32 if number < 2 else 42
            self.paper.draw_rect(
                pymupdf.Rect(x0, y - high, x1, y), color=WHITE, fill=color, width=1
            )
            self.paper.draw_line(
                (x1 + 4, y - high / 2), (x1 + 28, y - high / 2), color=GREY, width=0.8
            )
            self._line(x1 + 34, y - high / 2 + 3, name, 9.5)
            y -= high
        for x in (x0 - 8, x1):
            self.paper.draw_rect(
                pymupdf.Rect(x, y - 6, x + 8, self.y + 200), color=None, fill=(0.6, 0.45, 0.28)
            )
        for i in range(6):
            self._plant(x0 + 20 + i * 38, y)
        self.y += 214

    def _plant(self, x: float, y: float) -> None:
        self.paper.draw_line((x, y), (x, y - 22), color=GREEN, width=1.6)
        for side in (-1, 1):
            leaf = [(x, y - 8), (x + 12 * side, y - 12), (x + 14 * side, y - 24), (x, y - 20)]
            self.paper.draw_bezier(*leaf, color=GREEN, fill=LEAF, width=0.8, closePath=True)

    def cover(self, title: str, below: str) -> None:
        """A first page with a hill, a sun and rows of plants."""
        self.page()
        self.outline.append([1, title, 1, pymupdf.Point(LEFT, 100)])
        self.paper.draw_rect(pymupdf.Rect(0, 0, A4.width, 420), color=None, fill=(0.87, 0.93, 0.95))
        self.paper.draw_circle((440, 120), 46, color=None, fill=SUN)
        self.paper.draw_bezier(
            (0, 330), (180, 210), (360, 300), (A4.width, 250), color=None, fill=LEAF
        )
        self.paper.draw_rect(
            pymupdf.Rect(0, 330, A4.width, 420), color=None, fill=(0.42, 0.32, 0.22)
        )
        self.paper.draw_quad(
            pymupdf.Quad((0, 330), (A4.width, 250), (0, 332), (A4.width, 332)),
            color=None,
            fill=LEAF,
        )
        for row in range(3):
            for i in range(15):
                self._plant(24 + i * 39 + row * 9, 352 + row * 30)
        self._line(LEFT, 490, title, 30, GREEN, "hebo")
        self._line(LEFT, 518, below, 13, INK)
        self.y = 560

    def save(self, path: Path) -> None:
        """Write the file without anything that changes from run to run."""
        self.document.set_toc(
            [[level, text, page, {"kind": 1, "to": to}] for level, text, page, to in self.outline]
        )
        dates = {"creationDate": DATE, "modDate": DATE}
        self.document.set_metadata({"title": self.title, "author": GARDEN, **dates})
        self.document.save(path, garbage=3, deflate=True, no_new_id=True)
        self.document.close()


def handbook() -> Sheet:
    """Prose, a list and a table."""
    sheet = Sheet("Members' Handbook")
    sheet.cover("Members' Handbook", "What every plot holder should know, 2025 edition")
    sheet.prose(
        "The garden lies between Mill Lane and the brook. Forty-two plots, two glasshouses, an "
        "orchard of nineteen old apple trees and one very steep compost heap are looked after by "
        "some sixty members. This handbook says how we share them."
    )
    sheet.page()
    sheet.heading("Joining and leaving")
    sheet.prose(
        "Anyone who lives within three kilometres of the garden may join. Put your name on the "
        "waiting list at the shed or write to the secretary. When a plot becomes free it is "
        "offered to the person at the top of the list, who has ten days to accept. In 2024 the "
        "wait was about seven months."
    )
    sheet.prose(
        "A new member pays a deposit of 40 euros for the gate key. The deposit is paid back when "
        "the key is returned. Members who leave should clear their plot by 15 November, so that "
        "the soil can be covered before the first frost."
    )
    sheet.heading("Working days", 2)
    sheet.prose(
        "Each plot owes twelve hours of common work a year. Working days are on the first "
        "Saturday of the month from March to October, from nine until noon, and end with soup. "
        "Hours that are missing at the end of the year are charged at 8 euros each."
    )
    sheet.heading("Bees and dogs", 2)
    sheet.prose(
        "The three hives behind the orchard belong to the school. Keep two metres away from their"
        " front. Dogs are welcome on a lead, but not in the glasshouses, where the cat lives."
    )
    sheet.page()
    sheet.heading("Water and compost")
    sheet.prose(
        "Water comes from the well and from six rain barrels. From June to August watering with "
        "the hose is allowed only before eight in the morning and after seven in the evening. "
        "Cans may be filled at any time. Whoever finds a dripping tap closes it and tells the "
        "water warden."
    )
    sheet.heading("What goes on the compost", 2)
    sheet.points([
        "Yes: weeds without seeds, grass in thin layers, coffee grounds, egg shells, cardboard.",
        "No: cooked food, meat, cat litter, and tomato plants with blight (brown bin).",
        "Turn the heap in April and in September. Ripe compost is shared out in March.",
    ])  # fmt: skip
    sheet.heading("Tools", 2)
    sheet.prose(
        "Tools hang in the shed in the order of their outlines on the wall. Clean them before you"
        " hang them back. The chipper may be used by two people together only, with goggles; its "
        "key is with the tool warden. Broken tools go on the red shelf, with a note."
    )
    sheet.page()
    sheet.heading("Fees")
    sheet.prose(
        "Fees are for the calendar year and due on 31 January. They have not risen since 2022. "
        "Students, people out of work and members over seventy pay the reduced fee."
    )
    sheet.table(
        [("Plot", "Size", "Full fee", "Reduced fee", "Deposit"),
         ("Small bed", "12 m2", "36 euros", "18 euros", "40 euros"),
         ("Half plot", "40 m2", "84 euros", "42 euros", "40 euros"),
         ("Full plot", "80 m2", "150 euros", "75 euros", "40 euros"),
         ("Glasshouse shelf", "2 m2", "22 euros", "11 euros", "none"),
         ("Orchard share", "one tree", "15 euros", "15 euros", "none")],
        (0.28, 0.16, 0.19, 0.2, 0.17),
    )  # fmt: skip
    sheet.caption("Table 1: Yearly fees by kind of plot. The key deposit is paid once.")
    sheet.prose(
        "Late fees: 5 euros after 1 March. A plot that is unpaid on 1 April goes to the waiting "
        "list."
    )
    return sheet


def report() -> Sheet:
    """Charts and a table."""
    sheet = Sheet("Season Report 2024")
    sheet.page()
    sheet.heading("The year in short")
    sheet.prose(
        "It was a wet spring and a dry, hot August. The slugs took the first two sowings of "
        "lettuce; the pumpkins forgave us. All in all the garden brought in 1,486 kilograms of "
        "fruit and vegetables, nine per cent more than the year before. A fifth of it went to the"
        " soup kitchen in Station Road."
    )
    sheet.bars(
        {
            "Tomatoes": 312,
            "Potatoes": 405,
            "Pumpkins": 268,
            "Beans": 96,
            "Apples": 340,
            "Lettuce": 65,
        },
        "kg",
        100,
    )
    sheet.caption("Figure 1: Harvest of 2024 by crop, in kilograms.")
    sheet.prose(
        "Potatoes led for the third time running. Apples came back strongly after the late frost "
        "of 2023."
    )
    sheet.page()
    sheet.heading("Rain and watering")
    sheet.prose(
        "The gauge at the shed counts every drop. When the sky gave little, the well had to give "
        "more: the pump ran most in August, and the water warden asked for restraint three times."
    )
    sheet.curves(
        calendar.month_abbr[4:10],
        {"Rain, mm": (88, 97, 61, 42, 14, 55), "Well water, m3": (6, 8, 21, 34, 58, 17)}, 20,
    )  # fmt: skip
    sheet.caption(
        "Figure 2: Rain at the shed and water pumped from the well, April to September 2024."
    )
    sheet.prose(
        "A seventh rain barrel and mulch on all common beds should save a quarter of the well "
        "water in 2025."
    )
    sheet.page()
    sheet.heading("Money")
    sheet.prose("The cash box closed with a small surplus, mostly thanks to the plant sale in May.")
    sheet.table(
        [("Item", "Income", "Spending"),
         ("Fees", "4,180 euros", ""),
         ("Plant sale", "1,265 euros", "310 euros"),
         ("Summer party", "540 euros", "498 euros"),
         ("New pump for the well", "", "1,890 euros"),
         ("Seeds and young plants", "", "725 euros"),
         ("Insurance and rent", "", "1,640 euros"),
         ("Glass for the small glasshouse", "", "415 euros"),
         ("Total", "5,985 euros", "5,478 euros")],
        (0.5, 0.25, 0.25),
    )  # fmt: skip
    sheet.caption("Table 1: Income and spending in 2024. The surplus is 507 euros.")
    sheet.prose(
        "The largest bill was the new pump. The old one, from 1987, can be seen in the shed."
    )
    return sheet


def guide() -> Sheet:
    """A calendar, a drawing and a picture."""
    sheet = Sheet("Planting Guide")
    sheet.page()
    sheet.heading("When to sow, when to harvest")
    sheet.prose("Dates are for our valley, where the last frost comes in the second week of May.")
    sheet.calendar({
        "Broad beans": (2.5, 6, 7.5), "Carrots": (3.5, 7, 10.5), "Courgettes": (5, 7, 10),
        "Garlic": (10.5, 6.8, 8), "Kale": (5.5, 10, 12.9), "Onions": (3.2, 7.8, 9.3),
        "Pumpkins": (4.6, 9, 10.9), "Radishes": (3, 4.6, 9.5), "Spinach": (8, 9.5, 11.8),
        "Tomatoes": (3, 7.4, 10.2),
    })  # fmt: skip
    sheet.caption("Figure 1: Sowing and harvest times of ten crops in our garden.")
    sheet.prose(
        "Tomatoes are sown on the window sill in March and planted out after 15 May. Garlic is "
        "set in October and sleeps through the winter."
    )
    sheet.page()
    sheet.heading("Building a raised bed")
    sheet.prose(
        "A raised bed warms up two weeks earlier than the ground and spares your back. It is "
        "filled in four layers, coarse ones at the bottom, and settles by a third in the first "
        "year."
    )
    sheet.bed()
    sheet.caption("Figure 2: The four layers of a raised bed, from coarse to fine.")
    sheet.page()
    sheet.heading("Know your neighbours")
    sheet.prose(
        "The ladybird below eats up to fifty aphids a day. Leave some nettles standing at the "
        "fence, and her children will have a nursery."
    )
    sheet.picture(ladybird(), 300)
    sheet.caption("Figure 3: A seven-spot ladybird on a leaf, drawn by the children's group.")
    sheet.prose(
        "Hedgehogs take the slugs. The gap below the north gate is theirs; please do not close it."
    )
    return sheet


def ladybird() -> Image.Image:
    """A painted ladybird, made of soft-edged shapes."""
    sheet = pymupdf.open()
    paper = sheet.new_page(width=300, height=200)
    paper.draw_rect(paper.rect, color=None, fill=(0.8, 0.89, 0.78))
    paper.draw_bezier(
        (0, 170),
        (60, 20),
        (250, 10),
        (300, 120),
        color=None,
        fill=(0.42, 0.62, 0.3),
        closePath=True,
    )
    paper.draw_bezier(
        (0, 170),
        (80, 260),
        (250, 190),
        (300, 120),
        color=None,
        fill=(0.38, 0.58, 0.28),
        closePath=True,
    )
    paper.draw_line((0, 170), (300, 120), color=(0.6, 0.75, 0.45), width=2)
    for side in (-1, 1):
        for x in (120, 150, 180):
            paper.draw_line((x, 110), (x + (x - 150) * 0.4, 110 + side * 52), color=INK, width=3)
    paper.draw_oval(pymupdf.Rect(185, 88, 222, 132), color=None, fill=INK)
    paper.draw_oval(pymupdf.Rect(95, 70, 205, 150), color=None, fill=(0.82, 0.16, 0.12))
    paper.draw_line((96, 110), (205, 110), color=INK, width=2)
    for x, y in ((120, 92), (150, 88), (177, 95), (120, 128), (150, 132), (177, 125), (198, 110)):
        paper.draw_circle((x, y), 7, color=None, fill=INK)
    for y in (102, 118):
        paper.draw_circle((213, y), 3, color=None, fill=WHITE)
    shot = paper.get_pixmap(dpi=180)
    sheet.close()
    picture = Image.frombytes("RGB", (shot.width, shot.height), shot.samples)
    return picture.filter(ImageFilter.GaussianBlur(1.2))


def letter() -> Sheet:
    """A typed letter, scanned a little askew: a picture without a text layer."""
    typed = pymupdf.open()
    paper = typed.new_page(width=A4.width, height=A4.height)
    text = (
        "Hofmann & Daughters\nWell building and pumps\nQuarry Road 17\n\n\n\n"
        "Millbrook Community Garden\nMill Lane 3\n\n\n4 November 2024\n\n\n"
        "Inspection of your well\n\n"
        "Dear gardeners,\n\n"
        "on 29 October we inspected the well by the orchard. It is\n"
        "14.5 metres deep and the water stands at 9.2 metres. The new\n"
        "pump delivers 38 litres a minute, which is what you ordered.\n\n"
        "The water sample is clean; nitrate is at 21 milligrams per\n"
        "litre and well below the limit of 50. The wooden cover is\n"
        "rotten on its north side and should be replaced before the\n"
        "winter. We can do this for 260 euros.\n\n"
        "The next inspection is due in October 2026.\n\n\n"
        "Yours faithfully,\n\n\n\nElsa Hofmann"
    )
    paper.insert_text(
        (80, 90),
        text.split("\n"),
        fontsize=12,
        fontname="cour",
        lineheight=1.35,
        color=(0.1, 0.1, 0.15),
    )
    paper.draw_bezier(
        (82, 690), (110, 650), (130, 730), (165, 675), color=(0.1, 0.15, 0.5), width=1.6
    )
    shot = paper.get_pixmap(dpi=150, colorspace=pymupdf.csGRAY)
    typed.close()
    page = Image.frombytes("L", (shot.width, shot.height), shot.samples)
    page = page.rotate(0.7, Image.Resampling.BICUBIC, fillcolor=255)
    grain = Image.frombytes("L", page.size, random.Random(7).randbytes(page.width * page.height))
    page = Image.blend(page, grain.filter(ImageFilter.GaussianBlur(1)), 0.12)
    data = io.BytesIO()
    page.save(data, "JPEG", quality=70)
    sheet = Sheet("Letter about the well")
    sheet.paper = sheet.document.new_page(width=A4.width, height=A4.height)
    sheet.paper.insert_image(A4, stream=data.getvalue())
    return sheet


def main(out: Path) -> list[Path]:
    """Write the sample PDFs into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, make in (
        ("handbook", handbook),
        ("season-report", report),
        ("planting-guide", guide),
        ("well-letter", letter),
    ):
        paths.append(out / f"{name}.pdf")
        make().save(paths[-1])
    return paths


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
