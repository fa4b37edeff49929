"""A small web application. It imports much of the standard library and reads
configuration and templates, so that its start touches files all over its image."""
import asyncio
import decimal
import email.parser
import glob
import http.server
import json
import logging
import os
import sqlite3
import ssl
import sys
import urllib.parse
import xml.etree.ElementTree

HERE = os.path.dirname(os.path.realpath(__file__))


def read(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        url = urllib.parse.urlparse(self.path)
        if url.path == "/read":  # any file, for tests that check data
            body = open(urllib.parse.parse_qs(url.query)["path"][0], "rb").read()
        else:
            body = PAGE
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


settings = [read(p) for p in sorted(glob.glob("/etc/web/settings.d/*"))]
db = sqlite3.connect(":memory:")
db.execute("create table visits (at text)")
ssl.create_default_context()
PAGE = read(HERE + "/templates/page").format(greeting=read(HERE + "/greeting").strip()).encode()
PAGE += json.dumps({"python": sys.version, "settings": settings}).encode() + b"\n"

server = http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler)
server.serve_forever()
