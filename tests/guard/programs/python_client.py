"""One request by an unmodified Python library: `python_client.py LIBRARY URL`; prints the answer, or an error and exits 1.

mysql://HOST:PORT/SCHEMA?STATEMENT and smtp://HOST:PORT/RECIPIENT are for the libraries of those protocols.
"""

import asyncio
import os
import sys
from urllib.parse import unquote, urlsplit

CA = os.environ.get("SSL_CERT_FILE", "")


def http_client(url):
    import http.client

    parts = urlsplit(url)
    connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=60)
    connection.request("GET", parts.path)
    return connection.getresponse().read().decode()


def bare_context(url):
    """An SSLContext made by hand, which reads SSLKEYLOGFILE only when somebody makes it."""
    import http.client
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(CA)
    parts = urlsplit(url)
    connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=60, context=context)
    connection.request("GET", parts.path)
    return connection.getresponse().read().decode()


def urllib_request(url):
    import urllib.request

    return urllib.request.urlopen(url, timeout=60).read().decode()


def requests(url):
    import requests

    return requests.get(url, timeout=60).text


def httpx_sync(url):
    import httpx

    return httpx.get(url, timeout=60).text


def httpx_http2(url):
    import httpx

    with httpx.Client(http2=True, timeout=60) as client:
        return client.get(url).text


def httpx_async(url):
    import httpx

    async def work():
        async with httpx.AsyncClient(timeout=60) as client:
            return (await client.get(url)).text

    return asyncio.run(work())


def aiohttp(url):
    import aiohttp

    async def work():
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session, session.get(url) as answer:
            return await answer.text()

    return asyncio.run(work())


def pymysql(url):
    import pymysql

    parts = urlsplit(url)
    database = pymysql.connect(
        host=parts.hostname, port=parts.port, user="abc", password="xyz", database=parts.path[1:], ssl={"ca": CA}, connect_timeout=60
    )
    with database.cursor() as cursor:
        cursor.execute(unquote(parts.query))
        return str(cursor.fetchall())


def connector(url, **options):
    import mysql.connector

    parts = urlsplit(url)
    database = mysql.connector.connect(
        host=parts.hostname, port=parts.port, user="abc", password="xyz", database=parts.path[1:], ssl_ca=CA, connection_timeout=60, **options
    )
    cursor = database.cursor()
    cursor.execute(unquote(parts.query))
    return str(cursor.fetchall())


def connector_pure(url):
    return connector(url, use_pure=True)


def connector_c(url):
    return connector(url, use_pure=False)


def smtplib(url):
    import smtplib
    import ssl

    parts = urlsplit(url)
    with smtplib.SMTP(parts.hostname, parts.port, timeout=60) as mail:
        mail.starttls(context=ssl.create_default_context())
        mail.sendmail("function@images.test", [parts.path[1:]], f"Subject: photo\r\n\r\nFor {parts.path[1:]}.\r\n")
    return "ok"


if __name__ == "__main__":
    try:
        print(globals()[sys.argv[1]](sys.argv[2]))
    except Exception as error:
        print(type(error).__name__, error, file=sys.stderr)
        sys.exit(1)
