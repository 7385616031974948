"""Plain text of the files that packages carry: books, web pages, manual pages, Perl's and Wikipedia's markup."""

import bz2
import html
import json
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree


def plain(data: bytes) -> str:
    """Text as it is; books of before UTF-8 are in Windows' Latin 1."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


def gutenberg(data: bytes) -> str:
    """A book without the licence before and after it."""
    text = plain(data)
    start = re.search(r"\*\*\* ?START OF (THE|THIS) PROJECT GUTENBERG.*?\*\*\*", text, re.S)
    end = re.search(r"(\*\*\* ?)?END OF (THE|THIS) PROJECT GUTENBERG|End of the Project Gutenberg", text, re.I)
    return text[start.end() if start else 0 : end.start() if end else len(text)]


class _HtmlText(HTMLParser):
    BLOCKS = frozenset("p div br li tr pre dt dd blockquote h1 h2 h3 h4 h5 h6 table".split())
    HIDDEN = frozenset("script style head nav".split())

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = self.verbatim = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.hidden += tag in self.HIDDEN
        self.verbatim += tag == "pre"
        if tag in self.BLOCKS:
            self.parts.append("\n\n" if tag in ("p", "pre", "blockquote") or tag[0] == "h" else "\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in self.HIDDEN and self.hidden > 0
        self.verbatim -= tag == "pre" and self.verbatim > 0
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data if self.verbatim else re.sub(r"\s+", " ", data))


def boxed(data: bytes) -> str:
    """Text with tables in line-drawing characters, without the lines."""
    text = re.sub(r"^[ ─├┤┌┐└┘┬┴┼]+$", "", plain(data), flags=re.M)
    return text.replace("│", " ")


def web_page(data: bytes) -> str:
    """What an HTML page shows, block elements on lines of their own."""
    parser = _HtmlText()
    parser.feed(plain(data))
    return "".join(parser.parts)


def man_page(data: bytes) -> str:
    """A manual page without its roff requests: headings, paragraphs and tags, unindented."""
    lines = []
    for line in plain(data).splitlines():
        if line.startswith((".SH", ".SS")):
            line = "\n" + line[3:].strip().strip('"') + "\n"
        elif line.startswith(".TH"):
            line = "\n\n" + " ".join(line.split()[1:3])
        elif line.startswith((".PP", ".P", ".LP", ".TP", ".IP")):
            line = "\n" + " ".join(line.split()[1:2]).strip('"')
        elif re.match(r"\.(B|I|BR|IR|BI|IB|RB|RI|SM|SB)\b", line):
            roman = "R" in line.split()[0]  # alternating fonts: words are joined, as in "printf(3)"
            line = ("" if roman else " ").join(re.findall(r'"[^"]*"|\S+', line)[1:]).replace('"', "")
        elif line.startswith((".", "'")):
            continue
        line = re.sub(r"\\f\(?[A-Z]{1,2}|\\f[PBIR]|\\&|\\/|\\,|\\:", "", line)
        line = line.replace(r"\(aq", "'").replace(r"\(dq", '"').replace(r"\-", "-").replace(r"\e", "\\")
        lines.append(re.sub(r"\\\(..|\\\[[^]]*\]", "", line))
    return "\n".join(lines)


def pod(data: bytes) -> str:
    """Perl's documentation without its directives."""
    text = re.sub(r"^=(begin|end|for|encoding|over|back|pod|cut).*$", "", plain(data), flags=re.M)
    text = re.sub(r"^=(head\d|item) +", "", text, flags=re.M)
    text = re.sub(r"[A-Z]<<+ (.*?) >>+", r"\1", text, flags=re.S)
    for _ in range(3):  # codes nest
        text = re.sub(r"L<([^<>|]*)\|[^<>]*>|[A-DF-Z]<([^<>]*)>", r"\1\2", text)
    text = text.replace("E<lt>", "<").replace("E<gt>", ">")
    return text


def wiki_articles(data: bytes) -> list[str]:
    """The articles of a Wikipedia dump in their order, without markup, references, tables and lists of links."""
    articles = []
    for page in ElementTree.fromstring(bz2.decompress(data)):
        title, text = page.findtext("{*}title"), page.findtext("{*}revision/{*}text")
        if title is None or text is None or text.lower().startswith("#redirect"):
            continue
        text = re.sub(r"<!--.*?-->|<ref[^>]*/>|<(ref|gallery|math|timeline)\b.*?</\1>", "", text, flags=re.S)
        for _ in range(6):  # templates nest
            text = re.sub(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", "", text)
        text = re.split(r"^==+ *(See also|References|Notes|External links|Further reading) *==+", text, flags=re.M)[0]
        for _ in range(2):
            text = re.sub(r"\[\[(?:File|Image|Category)[^\[\]]*\]\]", "", text)
            text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)
        text = re.sub(r"\[https?://\S+ ?([^]]*)\]", r"\1", text)
        text = html.unescape(re.sub(r"'{2,}|<[^>]*>", "", text))
        text = re.sub(r"^(=+) *(.*?) *\1$", r"\n\2\n", text, flags=re.M)
        if len(text) > 3000:
            articles.append(f"{title}\n\n{text.strip()}\n")
    return articles


def wiki_train(data: bytes) -> str:
    """All articles but those of wiki_heldout: an article is a work."""
    return "\n\n".join(text for i, text in enumerate(wiki_articles(data)) if i % 8 != 7)


def wiki_heldout(data: bytes) -> str:
    """Every eighth article."""
    return "\n\n".join(wiki_articles(data)[7::8])


def verses(data: bytes) -> str:
    """The verses of a scripture in JSON, a line each, with their references."""
    lines: list[str] = []

    def walk(node: Any) -> None:
        if isinstance(node, list):
            for part in node:
                walk(part)
        elif isinstance(node, dict):
            lines.extend(str(node[key]) for key in ("reference", "heading", "text") if isinstance(node.get(key), str))
            for part in node.values():
                if isinstance(part, (list, dict)):
                    walk(part)

    walk(json.loads(data))
    return "\n".join(lines)
