"""Print the distinct paragraphs of LibreOffice's help in one language: python extract.py PACKAGE.deb > text.txt"""

import html
import re
import subprocess
import sys
import tarfile
from io import BytesIO

BLOCK = re.compile(r"<(p|h[1-6])\b[^>]*>(.*?)</\1>", re.S)


def main(package: str) -> None:
    """Print the paragraphs, separated by empty lines.

    The Hindi help is only partly translated: paragraphs with more Latin than Devanagari letters are omitted.
    """
    archive = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], capture_output=True, check=True).stdout
    seen = set()
    with tarfile.open(fileobj=BytesIO(archive)) as files:
        for member in sorted(files, key=lambda member: member.name):
            page = files.extractfile(member) if member.name.endswith(".html") else None
            for _, block in BLOCK.findall(page.read().decode()) if page else ():
                text = " ".join(html.unescape(re.sub(r"<[^>]*>", "", block)).split()).removeprefix("Title is: ")
                foreign = "-hi_" in package and count("[\u0900-\u097f]", text) <= count("[A-Za-z]", text)
                if len(text) > 20 and text not in seen and not foreign:
                    seen.add(text)
                    print(text, end="\n\n")


def count(letters: str, text: str) -> int:
    return len(re.findall(letters, text))


if __name__ == "__main__":
    main(sys.argv[1])
