"""Write the skeleton and the style of an HTML page, without any script."""

from html import escape

PHONE = "(max-width: 640px)"
CSS = """
:root { color-scheme: light dark; --ink: #24292f; --soft: #667079;
  --paper: #ffffff; --card: #f5f7f9; --line: #dde2e7; --accent: #c2410c;
  --bad: #b42318; --odd: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #d7dce3;
  --soft: #97a1ad; --paper: #14181d; --card: #1c2229; --line: #313943;
  --accent: #ff8a5c; --bad: #ff8f85; --odd: #e3b341; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 1rem; }
h1 small { display: block; font-size: .8rem; font-weight: 600;
  letter-spacing: .08em; text-transform: uppercase; color: var(--accent); }
h2 { font-size: 1.2rem; margin: 3rem 0 .6rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 0 0 .3rem; }
h4 { font-size: .95rem; margin: 0; }
p, ul { margin: .4rem 0 .8rem; max-width: 75ch; }
.soft, figcaption { color: var(--soft); font-size: .88rem; }
.scroll { overflow-x: auto; }
img { max-width: 100%; height: auto; }
figure { margin: 1rem 0; }
table { border-collapse: collapse; font-size: .86rem;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .4rem .5rem; text-align: right;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--paper); }
thead tr:first-child:not(:last-child) th { text-align: center;
  border-bottom: 0; padding-bottom: 0; }
.results td:nth-child(2), .results tr:last-child th:nth-child(2) {
  text-align: left; }
tr.ours td { font-weight: 700; background: var(--card); }
td.first, th.first { border-left: 1px solid var(--line); }
.example { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; padding: 1.1rem; margin: 1.25rem 0; }
.head { display: flex; flex-wrap: wrap; gap: 1rem 2rem;
  justify-content: space-between; align-items: flex-start; }
.head picture { flex: 0 1 300px; }
.signals { display: grid; gap: 1.1rem; margin-top: .9rem;
  grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); }
.signal header { display: flex; justify-content: space-between;
  align-items: baseline; gap: .5rem; margin-bottom: .3rem; }
.spectrogram { display: block; width: 100%; height: 130px;
  border-radius: 5px; image-rendering: auto; }
audio { width: 100%; height: 36px; margin: .4rem 0 .2rem; }
.words { margin: .2rem 0; font-size: .92rem; }
.words del { color: var(--bad); }
.words ins { color: var(--odd); text-decoration: none;
  border-bottom: 2px dotted var(--odd); }
.words mark { background: none; color: var(--bad);
  border-bottom: 2px solid var(--bad); }
.words mark s { color: var(--soft); font-size: .85em; }
.phone { display: none; }
@media PHONE { .phone { display: block; } .desk { display: none; }
  main { padding: 1.25rem .8rem 3rem; } h1 { font-size: 1.35rem; }
  table { font-size: .8rem; } th, td { padding: .35rem .3rem; }
  .phone table { font-size: .72rem; } .phone th { white-space: normal; }
  .phone th, .phone td { padding: .35rem .22rem; }
  .phone th:last-child, .phone td:last-child { display: none; }
  .example { padding: .8rem; } .signals { grid-template-columns: 1fr; } }
""".replace("PHONE", PHONE)


def tag(element, content=None, /, **attributes):
    """Write an HTML element.

    Example
    -------
    >>> tag("p", text("a < b"), class_="soft")
    '<p class="soft">a &lt; b</p>'
    """
    given = "".join(
        f' {key.rstrip("_")}="{escape(str(value))}"'
        for key, value in attributes.items()
    )
    if content is None:
        return f"<{element}{given}>"
    return f"<{element}{given}>{content}</{element}>"


def text(value):
    """Escape any value as text.

    Arguments
    ---------
    value : object
        What to show.

    Returns
    -------
    str
        HTML that shows it as it is.

    Example
    -------
    >>> text("<b>")
    '&lt;b&gt;'
    """
    return escape(str(value))


def page(title, body):
    """Write a whole HTML page.

    Arguments
    ---------
    title : str
        Plain text.
    body : str
        Inner HTML.

    Returns
    -------
    str
        The page, without any link to another file.

    Example
    -------
    >>> page("Report", tag("p", "hello")).splitlines()[0]
    '<!DOCTYPE html>'
    """
    head = (
        tag("meta", charset="utf-8")
        + tag(
            "meta",
            name="viewport",
            content="width=device-width, initial-scale=1",
        )
        + tag("title", text(title))
        + tag("style", CSS)
    )
    html = tag("head", head) + "\n" + tag("body", tag("main", body))
    return "<!DOCTYPE html>\n" + tag("html", html, lang="en") + "\n"
