"""Builds site/: each derivation on the left, its script on the right, and links between the two.

    python docs/side_by_side.py            writes site/index.html and one page for each file in docs/
    python docs/side_by_side.py --open     and opens it in the browser
    python docs/side_by_side.py --links    only writes the line numbers in docs/*.md anew

Every page is one file that needs nothing else: no network, no script from elsewhere. Formulas become
MathML, for which this needs latex2mathml (pip install latex2mathml).
"""

import argparse
import ast
import base64
import functools
import html
import json
import re
import sys
import webbrowser
from pathlib import Path

from markdown_it import MarkdownIt
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PATH = ("index", "sft", "reward_model", "reinforce", "one_prompt", "ppo", "grpo", "dpo", "trpo",
        "lora")  # the reading path
SCRIPTS = tuple(name for name in PATH if name not in ("index", "one_prompt"))
LENT = ("common", "lora")  # their functions open where a script calls them
TAG = re.compile(r"\(((?:RL|SFT|RM|PPO|TRPO|GRPO|DPO|LORA)\.\d+)\)")
# In MathML: a letter with a hat or a bar, or a letter. Longer names, such as log, are none.
LETTER = r"<mover>.*?</mover>|<mi>(?:.|&#x\w+;)</mi>"
MARKS = {"GRPO": "grpo", "DPO": "dpo", "PPO": "ppo", "TRPO": "trpo", "SFT": "sft", "LORA": "lora",
         "RM": "reward_model"}

# ------------------------------------------------------------------------------ the sources


def source(name):
    """The text of a script."""
    file = ROOT / f"{name}.py"
    return (file if file.is_file() else DOCS / f"{name}.py").read_text()


@functools.cache
def functions(name):
    """{function, class or method: (first line, last line)} of a script, decorators included."""
    found = {}
    for node in ast.parse(source(name)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = (first, node.end_lineno)
            for method in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(method, ast.FunctionDef):
                    found.setdefault(method.name, (method.lineno, method.end_lineno))
    return found


def tag_lines(name):
    """{tag: line of the code that computes it}: the first one below the script's docstring, or the
    docstring's own where no line has the tag."""
    text = source(name)
    docstring = ast.parse(text).body[0].end_lineno
    inside, below, comment = {}, {}, {}
    for number, line in enumerate(text.splitlines(), 1):
        for tag in TAG.findall(line):
            place = inside if number <= docstring else comment if "#" in line else below
            place.setdefault(tag, number)
    return {**inside, **below, **comment}


def symbols(name):
    """The rows of a page's symbol table: [(formula, code name, shape, meaning)]. A page without one
    has the table of docs/glossary.md."""
    file = page_file(name)
    found = re.search(r"\n\| in formulas \|.*\n\|[-|]+\n((?:\|.*\n)+)", file.read_text())
    if not found:
        return symbols("glossary")
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in found[1].splitlines()]
    return [[cell.strip() for cell in row[:4]] for row in cells]


def page_file(name):
    return DOCS / ("README.md" if name == "index" else f"{name}.md")


# ------------------------------------------------------------------------------ Markdown to HTML


def mathml(tex, display):
    from latex2mathml.converter import convert

    words = r"\\(?:text|texttt|mathrm|mathtt)\{[^{}]*\}"  # in these an underscore is escaped
    tex = re.sub(words, lambda m: m[0].replace(r"\_", "_"), tex)
    # Two spellings that GitHub knows and latex2mathml does not.
    tex = re.sub(r"\\mathcal ([A-Z])", r"\\mathcal{\1}", tex.replace("{aligned}", "{align*}"))
    return convert(tex, display="block" if display else "inline")


def inline_math(state, silent):
    """markdown-it rule: GitHub's $`...`$."""
    if not state.src.startswith("$`", state.pos):
        return False
    end = state.src.find("`$", state.pos + 2)
    if end < 0:
        return False
    if not silent:
        state.push("math", "math", 0).content = state.src[state.pos + 2 : end]
    state.pos = end + 2
    return True


def slug(text):
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


class Page:
    """One Markdown page with, where there is one, its script."""

    def __init__(self, name):
        self.name, self.script = name, name if name in SCRIPTS else None
        self.defined = functions(name) if self.script else {}
        self.lines = tag_lines(name) if self.script else {}
        self.headings, self.mentioned = [], set()
        self.symbols = symbols(name)
        self.by_code = {code.strip("`"): i for i, row in enumerate(self.symbols)
                        for code in row[1].split(", ") if code.startswith("`")}
        self.by_letter = self.letters()

    def letters(self):
        """{letter that a formula begins with: its rows of the symbol table}, such as A_t and A_i."""
        found = {}
        for i, row in enumerate(self.symbols):
            formula = self.formula(row[0].strip("$`"), False)
            letter = re.match(rf"(?:<(?:math|mrow|msub|msup|msubsup)\b[^>]*>)*({LETTER})", formula)
            if letter:
                found.setdefault(letter[1], []).append(i)
        return {letter: " ".join(map(str, rows)) for letter, rows in found.items()}

    def formula(self, tex, display):
        """MathML whose letters know their row of the symbol table."""
        def know(match):
            row = getattr(self, "by_letter", {}).get(match[0])
            return match[0] if row is None else match[0].replace(
                ">", f' class="sym" data-sym="{row}">', 1)

        return re.sub(LETTER, know, mathml(tex, display))

    # ---- rules for the parts of a page

    def fence(self, tokens, i, options, env):
        token = tokens[i]
        if token.info.strip() != "math":
            if token.info.strip() == "python":
                return highlight(token.content, PythonLexer(), HtmlFormatter(nowrap=False))
            return f"<pre><code>{html.escape(token.content)}</code></pre>\n"
        tag = re.search(r"\\tag\{(.*?)\}", token.content)
        tex = re.sub(r"\\tag\{.*?\}", "", token.content).replace(r"\qquad", r"\quad\quad")
        link, where = "", ""
        if tag:
            where = f' id="eq-{tag[1]}"'
            link = self.tag_link(tag[1])
        return f'<div class="eq"{where}>{self.formula(tex.strip(), True)}{link}</div>\n'

    def tag_link(self, tag):
        if tag in self.lines or not self.script:
            return f'<a class="tag" data-tag="{tag}" href="#eq-{tag}">({tag})</a>'
        page = MARKS.get(tag.split(".")[0])
        return f'<a href="{page}.html#eq-{tag}">({tag})</a>' if page else f"({tag})"

    def text(self, tokens, i, options, env):
        return TAG.sub(lambda m: self.tag_link(m[1]), html.escape(tokens[i].content, quote=False))

    def code(self, tokens, i, options, env):
        said = tokens[i].content
        shown = f"<code>{html.escape(said)}</code>"
        name = said.removesuffix("()").rpartition(".")[2]
        if self.script and name in self.defined and said.removesuffix("()") in (
                name, f"{self.script}.{name}"):
            first = "" if name in self.mentioned else f' id="fn-{name}"'
            self.mentioned.add(name)
            return f'<a class="fn"{first} href="#L{self.defined[name][0]}">{shown}</a>'
        if said in self.by_code:
            return f'<span class="sym" tabindex="0" data-sym="{self.by_code[said]}">{shown}</span>'
        return shown

    def image(self, tokens, i, options, env):
        token = tokens[i]
        data = base64.b64encode((DOCS / token.attrGet("src")).read_bytes()).decode()
        return (f'<img alt="{html.escape(token.content)}" '
                f'src="data:image/svg+xml;base64,{data}">')

    def link(self, tokens, i, options, env):
        """Links to pages become links to their HTML; links into this page's script, to its lines."""
        target = tokens[i].attrGet("href")
        file, _, anchor = target.partition("#")
        stem = Path(file).stem
        if file.endswith(".md") and "/" not in file:
            stem = "index" if file == "README.md" else stem
            target = f"{stem}.html" + (f"#{anchor}" if anchor else "")
        elif file == f"../{self.script}.py":
            target = f"#{anchor or 'L1'}"
        elif file.startswith("../") and stem in SCRIPTS and file.endswith(".py"):
            target = f"{stem}.html" + (f"#{anchor}" if anchor else "")
        elif file.startswith("../") or file.endswith(".py"):
            target = f"../docs/{target}"
        return f'<a href="{html.escape(target)}">'

    def heading(self, tokens, i, options, env):
        text = tokens[i + 1].content
        plain = re.sub(r"[$`*]|\\", "", text)
        self.headings.append((int(tokens[i].tag[1]), slug(plain), plain))
        return f'<{tokens[i].tag} id="{slug(plain)}">'

    def derivation(self):
        """The page as HTML."""
        md = MarkdownIt("commonmark", {"html": True}).enable("table")
        md.inline.ruler.before("backticks", "math", inline_math)
        rules = {"fence": self.fence, "text": self.text, "code_inline": self.code,
                 "image": self.image, "link_open": self.link, "heading_open": self.heading,
                 "math": lambda tokens, i, *_: self.formula(tokens[i].content, False)}
        for name, rule in rules.items():
            md.renderer.rules[name] = rule
        return md.render(page_file(self.name).read_text())

    # ---- the script

    def words(self, text):
        """A cell of the symbol table as HTML: formulas and code names in it as on the page."""
        text = re.sub(r"\$`(.*?)`\$", lambda m: f"\0{m[1]}\0", text)
        parts = text.split("\0")
        for i, part in enumerate(parts):
            parts[i] = self.formula(part, False) if i % 2 else re.sub(
                r"`([^`]*)`", r"<code>\1</code>", html.escape(part))
        return "".join(parts)

    def listing(self, module, first=1, last=None):
        """Lines of a module with colours, line numbers, and links for tags, symbols and calls."""
        lines = source(module).splitlines()[first - 1 : last]
        own = module == self.script and first == 1
        rows = highlight("\n".join(lines), PythonLexer(stripnl=False, ensurenl=False),
                         HtmlFormatter(nowrap=True)).split("\n")
        known, out = functions(module), []
        for number, row in enumerate(rows, first):
            row = TAG.sub(lambda m: self.tag_link(m[1]), row)
            row = self.with_calls(row, module, known)
            row = re.sub(r'<span class="n">(\w+)</span>', self.with_symbol, row)
            if own:
                row = re.sub(r'<span class="nf">(\w+)</span>', self.with_mention, row)
            anchor = f' id="L{number}"' if own else ""
            out.append(f'<span class="line"{anchor}><span class="no">{number}</span>'
                       f'<span class="src">{row or " "}</span></span>')
        return "".join(out)

    def with_calls(self, row, module, known):
        """`common.read` and `lora.use_adapter` open their source; inside common, so does `read(`."""
        def button(name, shown):
            return f'<a class="help" role="button" tabindex="0" data-help="{name}">{shown}</a>'

        row = re.sub(r'<span class="n">(common|lora)</span><span class="o">\.</span>'
                     r'<span class="n">(\w+)</span>',
                     lambda m: button(f"{m[1]}.{m[2]}", f"{m[1]}.{m[2]}")
                     if m[2] in functions(m[1]) and m[1] != self.script else m[0], row)
        if module in LENT and module != self.script:
            row = re.sub(r'<span class="n">(\w+)</span><span class="p">\(',
                         lambda m: button(f"{module}.{m[1]}", m[1]) + '<span class="p">('
                         if m[1] in known else m[0], row)
        return row

    def with_symbol(self, match):
        row = self.by_code.get(match[1])
        if row is None:
            return match[0]
        return f'<span class="n sym" tabindex="0" data-sym="{row}">{match[1]}</span>'

    def with_mention(self, match):
        if match[1] not in self.mentioned:
            return match[0]
        return f'<a class="nf back" href="#fn-{match[1]}">{match[1]}</a>'

    def helpers(self):
        """The source of every function of common and lora that can be opened, as templates."""
        out = []
        for module in LENT:
            for name, (first, last) in functions(module).items():
                if module != self.script:
                    out.append(f'<template id="src-{module}.{name}">'
                               f"{self.listing(module, first, last)}</template>")
        return "\n".join(out)


# ------------------------------------------------------------------------------ the pages

STYLE = """
:root { color-scheme: light dark; --ink: #1d2228; --paper: #ffffff; --soft: #f5f6f8; --line: #d5dae0;
  --accent: #a23b00; --hit: #ffef9e; }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe4ea; --paper: #15181c; --soft: #1d2127;
  --line: #363d46; --accent: #ff9d5c; --hit: #5c4a00; } }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: var(--paper); font: 16px/1.55 Georgia, serif; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; padding: 8px 24px; font: 14px sans-serif;
  border-bottom: 1px solid var(--line); align-items: baseline; }
nav details { position: relative; } nav summary { cursor: pointer; }
nav details div { position: absolute; z-index: 3; background: var(--soft); padding: 8px 14px;
  border: 1px solid var(--line); max-height: 70vh; overflow: auto; width: 320px; }
nav details a { display: block; padding: 2px 0; } nav .keys { margin-left: auto; opacity: .7; }
a { color: var(--accent); text-decoration-thickness: 1px; text-underline-offset: 2px; }
main { display: block; max-width: 860px; margin: 0 auto; padding: 0 24px 60px; }
body.two { height: 100vh; display: flex; flex-direction: column; }
body.two main { flex: 1; min-height: 0; display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 812px);
  max-width: none;
  margin: 0; padding: 0; width: 100%; }
body.two main > section { overflow: auto; padding: 0 24px 40vh; min-width: 0; }
#code { background: var(--soft); border-left: 1px solid var(--line); }
@media (max-width: 900px) { body.two { height: auto; display: block; }
  body.two main { display: block; } body.two main > section { padding-bottom: 40px; }
  #code { border-left: 0; border-top: 2px solid var(--line); } nav .keys { display: none; } }
pre, code, #code { font-family: ui-monospace, Menlo, Consolas, monospace; }
code { font-size: .88em; background: var(--soft); padding: 0 3px; }
pre { overflow: auto; font-size: 13px; line-height: 1.5; background: var(--soft); padding: 8px 12px; }
#code pre { padding: 0; margin: 16px 0; overflow: visible; font-size: 12px; }
#code { padding-left: 8px !important; padding-right: 8px !important; }
.line { display: flex; } .no { width: 42px; flex: none; opacity: .5; text-align: right;
  padding-right: 12px; user-select: none; } .src { white-space: pre-wrap; overflow-wrap: anywhere; }
.eq { display: flex; align-items: center; gap: 16px; margin: 14px 0; overflow-x: auto; padding: 4px 0; }
.eq math { margin: 0 auto; } .tag { white-space: nowrap; font: bold 14px sans-serif;
  text-decoration: none; } #code .tag, .inset .tag { font: bold 12px ui-monospace, monospace; }
.hit { background: var(--hit); } .sym { cursor: help; border-bottom: 1px dotted; } mi.sym, mover.sym { border: 0; }
.help, .fn, .back { cursor: pointer; text-decoration: underline dotted; color: inherit; }
.inset { display: block; border: 1px solid var(--line); border-left: 3px solid var(--accent);
  margin: 4px 0 4px 30px; background: var(--paper); padding: 4px 0; }
.inset .close { float: right; margin-right: 8px; font: 12px sans-serif; cursor: pointer; }
#tip { position: fixed; z-index: 5; max-width: 380px; padding: 8px 12px; font: 14px/1.4 sans-serif;
  background: var(--paper); border: 1px solid var(--line); box-shadow: 0 2px 10px #0004; display: none; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 15px; }
td, th { border: 1px solid var(--line); padding: 3px 9px; vertical-align: top; }
img { max-width: 100%; height: auto; }
blockquote { margin: 16px 0; padding: 2px 18px; border: 1px solid var(--line);
  border-left: 3px solid var(--accent); }
"""

SCRIPT = """
const all = (s, e = document) => [...e.querySelectorAll(s)];
const page = document.querySelector('#page'), code = document.querySelector('#code');
function mark(node) {
  all('.hit').forEach(x => x.classList.remove('hit'));
  node.classList.add('hit'); node.scrollIntoView({block: 'center'});
}
function show(tag, side) {           // the other end of an equation: its formula, or its line of code
  const formula = document.getElementById('eq-' + tag), line = LINES[tag];
  if (side === code && line) mark(document.getElementById('L' + line));
  else if (formula) mark(formula);
}
function open_help(a) {              // the source of a function of common or lora, below the line
  const line = a.closest('.line'), next = line.nextElementSibling;
  if (next && next.className === 'inset' && next.dataset.of === a.dataset.help) return next.remove();
  const source = document.getElementById('src-' + a.dataset.help), box = document.createElement('span');
  box.className = 'inset'; box.dataset.of = a.dataset.help;
  box.innerHTML = '<a class="close" role="button" tabindex="0">close</a>' + source.innerHTML;
  line.after(box);
}
function act(event) {
  const a = event.target.closest('a');
  if (!a) return;
  if (a.matches('.tag')) { event.preventDefault(); show(a.dataset.tag, a.closest('#code') ? page : code); }
  else if (a.matches('.help')) { event.preventDefault(); open_help(a); }
  else if (a.matches('.close')) a.parentElement.remove();
  else if ((a.getAttribute('href') || '').startsWith('#')) {
    const node = document.getElementById(decodeURIComponent(a.getAttribute('href').slice(1)));
    if (node) { event.preventDefault(); mark(node); }
  }
}
document.addEventListener('click', act);
let at = -1;
document.addEventListener('keydown', event => {
  if (event.key === 'Enter' && event.target.matches('.help, .close')) return act(event);
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const step = {n: 1, p: -1}[event.key], tags = all('#page .eq .tag');
  if (!step || !tags.length) return;
  at = Math.max(0, Math.min(tags.length - 1, at + step));
  const tag = tags[at].dataset.tag, line = LINES[tag];
  mark(document.getElementById('eq-' + tag));
  if (line) { const l = document.getElementById('L' + line); l.classList.add('hit');
    l.scrollIntoView({block: 'center'}); }
});
const tip = document.querySelector('#tip');
function hover(event) {
  const node = event.target.closest && event.target.closest('.sym');
  if (!node) { tip.style.display = 'none'; return; }
  tip.innerHTML = node.dataset.sym.split(' ').map(row => SYMBOLS[row]).join('<hr>'); tip.style.display = 'block';
  const box = node.getBoundingClientRect();
  tip.style.left = Math.min(box.left, innerWidth - tip.offsetWidth - 8) + 'px';
  tip.style.top = (box.bottom + tip.offsetHeight + 8 < innerHeight ? box.bottom + 6
    : box.top - tip.offsetHeight - 6) + 'px';
}
document.addEventListener('mouseover', hover); document.addEventListener('focusin', hover);
function arrive() {                  // a link from another page: #L12, #eq-PPO.2 or a heading
  const node = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (node) mark(node);
}
addEventListener('hashchange', arrive); arrive();
"""

TITLES = {"index": "The course", "sft": "SFT", "reward_model": "Reward model", "ppo": "PPO",
          "grpo": "GRPO", "dpo": "DPO", "trpo": "TRPO", "lora": "LoRA", "reinforce": "REINFORCE",
          "one_prompt": "One prompt"}


def build_page(name, names):
    """The HTML of one page."""
    page = Page(name)
    derivation = page.derivation()
    around = ""
    if name in PATH:
        i = PATH.index(name)
        if i:
            around += f'<a href="{PATH[i - 1]}.html">&larr; {TITLES[PATH[i - 1]]}</a>'
        if i + 1 < len(PATH):
            around += f'<a href="{PATH[i + 1]}.html">{TITLES[PATH[i + 1]]} &rarr;</a>'
    contents = "".join(f'<a href="#{anchor}" style="padding-left:{12 * (level - 2)}px">'
                       f"{html.escape(text)}</a>"
                       for level, anchor, text in page.headings if level > 1)
    pages = "".join(f'<a href="{n}.html">{TITLES.get(n, n.replace("_", " "))}</a>' for n in names)
    keys = '<span class="keys">keys n, p: next and previous equation</span>' if page.script else ""
    body = f'<section id="page">{derivation}</section>'
    if page.script:
        body += (f'<section id="code"><pre class="highlight">{page.listing(name)}</pre>'
                 f"{page.helpers()}</section>")
    rows = [f"{page.formula(formula.strip('$`'), False)} &nbsp; <code>{html.escape(code)}</code>"
            f" &nbsp; {html.escape(shape)}<br>{page.words(meaning)}"
            for formula, code, shape, meaning in page.symbols]
    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    plain = "\n.highlight { background: transparent !important; }"
    title = TITLES.get(name, name.replace("_", " "))
    data = f"const LINES = {json.dumps(page.lines)}, SYMBOLS = {json.dumps(rows)};"
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width"><title>{title} - RLHF, line by '
            f"line</title><style>{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}{plain}"
            f'{STYLE}</style></head>\n<body class="{"two" if page.script else "one"}">'
            f'<nav><a href="index.html">RLHF, line by line</a>'
            f"<details><summary>on this page</summary><div>{contents}</div></details>"
            f"<details><summary>all pages</summary><div>{pages}</div></details>{around}{keys}</nav>"
            f'\n<main>{body}</main><div id="tip" role="tooltip"></div>'
            f"<script>{data}{SCRIPT}</script></body></html>\n")


def build(out):
    """Writes all pages to the folder `out`; returns their names."""
    others = sorted(p.stem for p in DOCS.glob("*.md") if p.stem not in ("README", *PATH))
    names = [*PATH, *others]
    out.mkdir(exist_ok=True)
    for old in out.glob("*.html"):  # of a page that is no more
        old.unlink()
    for name in names:
        (out / f"{name}.html").write_text(build_page(name, names))
    return names


# ------------------------------------------------------------------------------ line numbers


def with_lines(text):
    """The Markdown text with the lines of functions in its links: [`gae`](../ppo.py#L12)."""
    def number(match):
        said, script = match[1], match[2]
        name = said.removesuffix("()").rpartition(".")[2]
        found = functions(script) if (ROOT / f"{script}.py").is_file() else {}
        anchor = f"#L{found[name][0]}" if name in found else ""
        return f"[`{said}`](../{script}.py{anchor})"

    return re.sub(r"\[`([\w.]+(?:\(\))?)`\]\(\.\./(\w+)\.py(?:#L\d+)?\)", number, text)


# ------------------------------------------------------------------------------ command


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("--open", action="store_true", help="open the first page in the browser")
    p.add_argument("--links", action="store_true", help="only put line numbers into docs/*.md")
    args = p.parse_args(argv)
    if args.links:
        for page in DOCS.glob("*.md"):
            page.write_text(with_lines(page.read_text()))
        return
    try:
        import latex2mathml  # noqa: F401
    except ImportError:
        print("error: latex2mathml is missing; pip install latex2mathml", file=sys.stderr)
        raise SystemExit(2) from None
    names = build(ROOT / "site")
    print(f"{len(names)} pages in site/")
    if args.open:
        webbrowser.open((ROOT / "site" / "index.html").as_uri())


if __name__ == "__main__":
    main()
