package http1

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"reflect"
	"strings"
	"testing"

	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire"
)

const simple = "GET /a HTTP/1.1\r\nHost: api\r\n\r\n"

// requests that common clients send, as they write them.
var accepted = map[string]string{
	"curl":            "GET /a/b?x=1&y=%20 HTTP/1.1\r\nHost: api.example:8080\r\nUser-Agent: curl/7.88.1\r\nAccept: */*\r\n\r\n",
	"python requests": "POST /function/f HTTP/1.1\r\nHost: gateway:8080\r\nUser-Agent: python-requests/2.31.0\r\nAccept-Encoding: gzip, deflate\r\nAccept: */*\r\nConnection: keep-alive\r\nContent-Length: 2\r\nContent-Type: application/json\r\n\r\n{}",
	"http.client":     "GET /image.jpg HTTP/1.1\r\nHost: images\r\nAccept-Encoding: identity\r\n\r\n",
	"urllib":          "GET /x HTTP/1.1\r\nAccept-Encoding: identity\r\nHost: 10.0.0.1:80\r\nUser-Agent: Python-urllib/3.11\r\nConnection: close\r\n\r\n",
	"node fetch":      "POST /x HTTP/1.1\r\nhost: api\r\nconnection: keep-alive\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
	"expect":          "PUT /x HTTP/1.1\r\nHost: api\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\nhello",
	"empty body":      "DELETE /x HTTP/1.1\r\nHost: [2001:db8::1]:8080\r\nContent-Length: 0\r\n\r\n",
	"trailing slash":  "OPTIONS /x/ HTTP/1.1\r\nHost: api\r\n\r\n",
	"root":            "HEAD / HTTP/1.1\r\nHost: API.example\r\nTE: trailers\r\n\r\n",
}

func TestRequestsOfCommonClientsAreRead(t *testing.T) {
	for name, text := range accepted {
		head, n, err := ParseRequest([]byte(text))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		// Go's own server is the second reader: both have to see the same request.
		want, err := http.ReadRequest(bufio.NewReader(strings.NewReader(text)))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		chunked := len(want.TransferEncoding) == 1
		if head.Method != want.Method || head.Target != want.RequestURI || head.Path != want.URL.Path || head.Host != strings.ToLower(want.Host) ||
			head.Chunked != chunked || !chunked && head.ContentLength != want.ContentLength || head.Close != want.Close {
			t.Errorf("%s: %#v", name, head)
		}
		if text[n-4:n] != "\r\n\r\n" || strings.Index(text, "\r\n\r\n")+4 != n {
			t.Errorf("%s: the head has %d bytes", name, n)
		}
	}
}

func TestWhatServersReadDifferentlyIsRefused(t *testing.T) {
	head := func(fields string) string { return "POST /a HTTP/1.1\r\nHost: api\r\n" + fields + "\r\n" }
	get := func(target string) string { return "GET " + target + " HTTP/1.1\r\nHost: api\r\n\r\n" }
	for name, c := range map[string]struct {
		text   string
		reason policy.Reason
	}{
		// The list of shared readings: RFC 9112 sections 2.2, 3, 5, 6 and 11.2.
		"length and chunked":             {head("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"), "malformed"},
		"chunked and length":             {head("Transfer-Encoding: chunked\r\nContent-Length: 5\r\n"), "malformed"},
		"two lengths":                    {head("Content-Length: 5\r\nContent-Length: 6\r\n"), "malformed"},
		"two equal lengths":              {head("Content-Length: 5\r\nContent-Length: 5\r\n"), "malformed"},
		"a list of lengths":              {head("Content-Length: 5, 5\r\n"), "malformed"},
		"a length with a sign":           {head("Content-Length: +5\r\n"), "malformed"},
		"a negative length":              {head("Content-Length: -5\r\n"), "malformed"},
		"a length in hexadecimal":        {head("Content-Length: 0x5\r\n"), "malformed"},
		"a length with an underscore":    {head("Content-Length: 1_0\r\n"), "malformed"},
		"a length with a space":          {head("Content-Length: 1 0\r\n"), "malformed"},
		"an empty length":                {head("Content-Length:\r\n"), "malformed"},
		"a length of 19 digits":          {head("Content-Length: 1000000000000000000\r\n"), "malformed"},
		"another encoding":               {head("Transfer-Encoding: gzip\r\n"), "malformed"},
		"identity":                       {head("Transfer-Encoding: identity\r\n"), "malformed"},
		"gzip, chunked":                  {head("Transfer-Encoding: gzip, chunked\r\n"), "malformed"},
		"chunked, chunked":               {head("Transfer-Encoding: chunked, chunked\r\n"), "malformed"},
		"chunked twice":                  {head("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n"), "malformed"},
		"chunked in capitals":            {head("Transfer-Encoding: Chunked\r\n"), "malformed"},
		"chunked with a parameter":       {head("Transfer-Encoding: chunked;q=1\r\n"), "malformed"},
		"chunked in quotes":              {head("Transfer-Encoding: \"chunked\"\r\n"), "malformed"},
		"chunked behind a tab in a name": {head("Transfer-Encoding\t: chunked\r\n"), "malformed"},
		"a vertical tab in a value":      {head("Transfer-Encoding: \x0bchunked\r\n"), "malformed"},
		"a space before the colon":       {head("Content-Length : 5\r\n"), "malformed"},
		"a folded line":                  {head("X-A: b\r\n c\r\n"), "malformed"},
		"a folded first line":            {"POST /a HTTP/1.1\r\n Host: api\r\n\r\n", "malformed"},
		"a field without a colon":        {head("Content-Length 5\r\n"), "malformed"},
		"a field without a name":         {head(": 5\r\n"), "malformed"},
		"a bare line feed in the head":   {"POST /a HTTP/1.1\r\nHost: api\nX: y\r\n\r\n", "malformed"},
		"bare line feeds at the end":     {"POST /a HTTP/1.1\r\nHost: api\n\n", "malformed"},
		"a bare carriage return":         {head("X: a\rb\r\n"), "malformed"},
		"two carriage returns":           {head("X: a\r\r\n"), "malformed"},
		"a zero byte":                    {head("X: a\x00b\r\n"), "malformed"},
		"a byte beyond ASCII":            {head("X: \xe9\r\n"), "malformed"},
		"a byte beyond ASCII in a path":  {get("/\xc3\xa9"), "malformed"},
		"a delete byte":                  {head("X: \x7f\r\n"), "malformed"},
		"an empty line before the head":  {"\r\n" + simple, "malformed"},
		"an underscore in a name":        {head("Content_Length: 5\r\n"), "malformed"},
		"the guard's field by another":   {head("X_Kalium_Token: t\r\n"), "malformed"},
		"a dot in a name":                {head("X.Kalium.Token: t\r\n"), "malformed"},
		// The request line.
		"HTTP/0.9":               {"GET /a\r\n\r\n", "malformed"},
		"HTTP/1.0":               {"GET /a HTTP/1.0\r\nHost: api\r\n\r\n", "unsupported"},
		"HTTP/2.0":               {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "unsupported"},
		"http/1.1":               {"GET /a http/1.1\r\nHost: api\r\n\r\n", "unsupported"},
		"HTTP/1.10":              {"GET /a HTTP/1.10\r\nHost: api\r\n\r\n", "unsupported"},
		"two spaces":             {"GET  /a HTTP/1.1\r\nHost: api\r\n\r\n", "malformed"},
		"a space at the end":     {"GET /a HTTP/1.1 \r\nHost: api\r\n\r\n", "malformed"},
		"a space before":         {" GET /a HTTP/1.1\r\nHost: api\r\n\r\n", "malformed"},
		"a tab between":          {"GET\t/a HTTP/1.1\r\nHost: api\r\n\r\n", "malformed"},
		"a space in the target":  {"GET /a b HTTP/1.1\r\nHost: api\r\n\r\n", "malformed"},
		"a method in small":      {"get /a HTTP/1.1\r\nHost: api\r\n\r\n", "malformed"},
		"a method of 17 bytes":   {strings.Repeat("A", 17) + " /a HTTP/1.1\r\nHost: api\r\n\r\n", "malformed"},
		"CONNECT":                {"CONNECT api:80 HTTP/1.1\r\nHost: api:80\r\n\r\n", "unsupported"},
		"TRACE":                  {"TRACE /a HTTP/1.1\r\nHost: api\r\n\r\n", "unsupported"},
		"an absolute target":     {get("http://other/a"), "unsupported"},
		"a scheme-relative one":  {get("//other/a"), "malformed"},
		"an asterisk":            {"OPTIONS * HTTP/1.1\r\nHost: api\r\n\r\n", "unsupported"},
		"a dot segment":          {get("/a/./b"), "malformed"},
		"a double dot segment":   {get("/a/../b"), "malformed"},
		"a double dot at an end": {get("/a/.."), "malformed"},
		"an empty segment":       {get("/a//b"), "malformed"},
		"an escape in a path":    {get("/%61"), "malformed"},
		"an escaped slash":       {get("/a%2fb"), "malformed"},
		"a backslash":            {get("/a\\b"), "malformed"},
		"a path parameter":       {get("/a;b=c"), "malformed"},
		"a fragment":             {get("/a#b"), "malformed"},
		"a quote":                {get("/a\"b"), "malformed"},
		"a target of 8193 bytes": {get("/" + strings.Repeat("a", targetMax)), "too_large"},
		// The query.
		"an empty query":       {get("/a?"), "malformed"},
		"a key twice":          {get("/a?b=1&b=2"), "malformed"},
		"an empty key":         {get("/a?=1"), "malformed"},
		"an empty pair":        {get("/a?b=1&&c=2"), "malformed"},
		"an escaped key":       {get("/a?%62=1"), "malformed"},
		"a plus in a key":      {get("/a?b+c=1"), "malformed"},
		"a semicolon":          {get("/a?b=1;c=2"), "malformed"},
		"a broken escape":      {get("/a?b=%4"), "malformed"},
		"a broken escape more": {get("/a?b=%4g"), "malformed"},
		"33 keys":              {get("/a?" + manyKeys(33)), "too_large"},
		// The host.
		"no host":               {"GET /a HTTP/1.1\r\n\r\n", "malformed"},
		"two hosts":             {"GET /a HTTP/1.1\r\nHost: api\r\nHost: api\r\n\r\n", "malformed"},
		"an empty host":         {"GET /a HTTP/1.1\r\nHost:\r\n\r\n", "malformed"},
		"a host with a user":    {"GET /a HTTP/1.1\r\nHost: u@api\r\n\r\n", "malformed"},
		"a host with a path":    {"GET /a HTTP/1.1\r\nHost: api/b\r\n\r\n", "malformed"},
		"two hosts in one":      {"GET /a HTTP/1.1\r\nHost: api, other\r\n\r\n", "malformed"},
		"an empty port":         {"GET /a HTTP/1.1\r\nHost: api:\r\n\r\n", "malformed"},
		"port 0":                {"GET /a HTTP/1.1\r\nHost: api:0\r\n\r\n", "malformed"},
		"a port with a zero":    {"GET /a HTTP/1.1\r\nHost: api:080\r\n\r\n", "malformed"},
		"port 65536":            {"GET /a HTTP/1.1\r\nHost: api:65536\r\n\r\n", "malformed"},
		"two ports":             {"GET /a HTTP/1.1\r\nHost: api:80:80\r\n\r\n", "malformed"},
		"a dot before the host": {"GET /a HTTP/1.1\r\nHost: .api\r\n\r\n", "malformed"},
		"brackets left open":    {"GET /a HTTP/1.1\r\nHost: [::1\r\n\r\n", "malformed"},
		"a name in brackets":    {"GET /a HTTP/1.1\r\nHost: [api]\r\n\r\n", "malformed"},
		// Ways out of the protocol.
		"upgrade":                    {head("Upgrade: websocket\r\nConnection: Upgrade\r\n"), "unsupported"},
		"upgrade without connection": {head("Upgrade: h2c\r\n"), "unsupported"},
		"HTTP2-Settings":             {head("HTTP2-Settings: x\r\n"), "unsupported"},
		"trailers":                   {head("Trailer: x\r\n"), "unsupported"},
		"a field named for removal":  {head("Connection: close, X-Kalium-Token\r\n"), "unsupported"},
		"an empty connection option": {head("Connection: close,\r\n"), "unsupported"},
		"an expectation of its own":  {head("Expect: 200-ok\r\n"), "malformed"},
		"two expectations":           {head("Expect: 100-continue\r\nExpect: 100-continue\r\n"), "malformed"},
		// Another request than the one that was judged.
		"a GET with a body":         {"GET /a HTTP/1.1\r\nHost: api\r\nContent-Length: 5\r\n\r\n", "unsupported"},
		"a GET with chunks":         {"GET /a HTTP/1.1\r\nHost: api\r\nTransfer-Encoding: chunked\r\n\r\n", "unsupported"},
		"a HEAD with a body":        {"HEAD /a HTTP/1.1\r\nHost: api\r\nContent-Length: 5\r\n\r\n", "unsupported"},
		"a DELETE with a body":      {"DELETE /a HTTP/1.1\r\nHost: api\r\nContent-Length: 5\r\n\r\n", "unsupported"},
		"another method in a field": {head("X-HTTP-Method-Override: DELETE\r\n"), "unsupported"},
		"another target in a field": {head("x-original-url: /admin\r\n"), "unsupported"},
		// Bounds.
		"101 fields":          {head(strings.Repeat("X: y\r\n", FieldsMax)), "too_large"},
		"a head of 16385":     {head("X: " + strings.Repeat("y", HeadBytesMax) + "\r\n"), "too_large"},
		"an endless head":     {"GET /a HTTP/1.1\r\nX: " + strings.Repeat("y", HeadBytesMax), "too_large"},
		"TLS in HTTP's place": {"\x16\x03\x01\x02\x00", "malformed"},
		"a binary protocol":   {"J\x00\x00\x01", "malformed"},
	} {
		head, n, err := ParseRequest([]byte(c.text))

		var refused *wire.Error
		if head != nil || n != 0 || !errors.As(err, &refused) || refused.Reason != c.reason {
			t.Errorf("%s: %#v, %d bytes, %v; want %s", name, head, n, err, c.reason)
		}
	}
}

func manyKeys(n int) string {
	var keys []string
	for i := range n {
		keys = append(keys, string(rune('a'+i/26))+string(rune('a'+i%26)))
	}
	return strings.Join(keys, "&")
}

func TestBoundsThemselvesPass(t *testing.T) {
	for name, text := range map[string]string{
		"32 keys":              "GET /a?" + manyKeys(queryKeysMax) + " HTTP/1.1\r\nHost: api\r\n\r\n",
		"100 fields":           "GET /a HTTP/1.1\r\nHost: api\r\n" + strings.Repeat("X: y\r\n", FieldsMax-1) + "\r\n",
		"a head of 16384":      simple[:len(simple)-2] + "X: " + strings.Repeat("y", HeadBytesMax-len(simple)-5) + "\r\n\r\n",
		"a target of 8192":     "GET /" + strings.Repeat("a", targetMax-1) + " HTTP/1.1\r\nHost: api\r\n\r\n",
		"a method of 16 bytes": strings.Repeat("A", methodMax) + " / HTTP/1.1\r\nHost: api\r\n\r\n",
		"a length of 18":       "POST / HTTP/1.1\r\nHost: api\r\nContent-Length: 999999999999999999\r\n\r\n",
	} {
		if _, n, err := ParseRequest([]byte(text)); err != nil || n != len(text) {
			t.Errorf("%s: %d of %d bytes, %v", name, n, len(text), err)
		}
	}
}

func TestAnIncomingRequestMayHaveABodyWhateverItsMethod(t *testing.T) {
	for _, fields := range []string{"Content-Length: 5\r\n", "Transfer-Encoding: chunked\r\n", "X-HTTP-Method-Override: PUT\r\n"} {
		text := "GET /a HTTP/1.1\r\nHost: f\r\n" + fields + "\r\n"

		if _, _, err := ParseIncoming([]byte(text)); err != nil {
			t.Errorf("%q: %v", fields, err)
		}
		if _, _, err := ParseRequest([]byte(text)); err == nil {
			t.Errorf("%q: a function may send it", fields)
		}
	}
}

func TestEveryPrefixOfARequestIsShort(t *testing.T) {
	for name, text := range accepted {
		end := strings.Index(text, "\r\n\r\n") + 4
		for i := range end {
			if _, _, err := ParseRequest([]byte(text[:i])); err != wire.ErrShort {
				t.Errorf("%s, %d bytes: %v", name, i, err)
			}
		}
	}
}

func TestAnotherProtocolIsRefusedAtItsFirstBytes(t *testing.T) {
	for _, text := range []string{"\x16", "\x00", "(", "GET/a", "abcdefghijklmnopq", "GET /a HTTP/2\r\n", "CONNECT a:1 HTTP/1.1\r\n"} {
		if _, _, err := ParseRequest([]byte(text)); err == wire.ErrShort || err == nil {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestAHeadIsWrittenAsItWasJudged(t *testing.T) {
	text := "POST /function/f HTTP/1.1\r\nX-Kalium-Token: forged\r\nhost: Gateway:8080\r\nProxy-Connection: keep-alive\r\nKeep-Alive: timeout=5\r\n" +
		"TE: trailers\r\nX-A:\t b  \r\nContent-Length: 007\r\nConnection: close\r\n\r\n"
	head, _, err := ParseRequest([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	drop := func(name string) bool { return strings.HasPrefix(name, "x-kalium-") || name == "host" }

	got := string(head.Append([]byte("before "), drop, Field{"X-Kalium-Token", "real"}))

	want := "before POST /function/f HTTP/1.1\r\nhost: Gateway:8080\r\nX-A: b\r\nContent-Length: 7\r\nConnection: close\r\nX-Kalium-Token: real\r\n\r\n"
	if got != want {
		t.Errorf("%q", got)
	}
}

func TestAnAnswersEndIsFound(t *testing.T) {
	for name, c := range map[string]struct {
		method, text string
		want         ResponseHead
	}{
		"a length":           {"GET", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", ResponseHead{Status: 200, ContentLength: 5}},
		"equal lengths":      {"GET", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n", ResponseHead{Status: 200, ContentLength: 5}},
		"chunks":             {"GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n", ResponseHead{Status: 200, Chunked: true}},
		"until close":        {"GET", "HTTP/1.1 200 OK\r\n\r\n", ResponseHead{Status: 200, UntilClose: true, Close: true}},
		"HTTP/1.0":           {"GET", "HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\n", ResponseHead{Status: 200, ContentLength: 5, Close: true}},
		"HTTP/1.0 kept":      {"GET", "HTTP/1.0 200 OK\r\nContent-Length: 5\r\nConnection: keep-alive\r\n\r\n", ResponseHead{Status: 200, ContentLength: 5}},
		"no reason":          {"GET", "HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", ResponseHead{Status: 200}},
		"beyond ASCII":       {"GET", "HTTP/1.1 404 pas trouv\xe9\r\nContent-Length: 0\r\n\r\n", ResponseHead{Status: 404}},
		"HEAD":               {"HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", ResponseHead{Status: 200, NoBody: true}},
		"204":                {"POST", "HTTP/1.1 204 No Content\r\n\r\n", ResponseHead{Status: 204, NoBody: true}},
		"304 with a length":  {"GET", "HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", ResponseHead{Status: 304, NoBody: true}},
		"100":                {"POST", "HTTP/1.1 100 Continue\r\n\r\n", ResponseHead{Status: 100, NoBody: true, Interim: true}},
		"103 with a length":  {"GET", "HTTP/1.1 103 Early Hints\r\nContent-Length: 5\r\n\r\n", ResponseHead{Status: 103, NoBody: true, Interim: true}},
		"the server's close": {"GET", "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: Close\r\n\r\n", ResponseHead{Status: 200, ContentLength: 1, Close: true}},
	} {
		head, n, err := ParseResponse([]byte(c.text+"rest"), c.method)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		head.Fields = nil
		if n != len(c.text) || !reflect.DeepEqual(*head, c.want) {
			t.Errorf("%s: %d bytes, %#v", name, n, *head)
		}
		for i := range len(c.text) {
			if _, _, err := ParseResponse([]byte(c.text[:i]), c.method); err != wire.ErrShort {
				t.Errorf("%s, %d bytes: %v", name, i, err)
			}
		}
	}
}

func TestAnAnswerWhoseEndIsOpenIsRefused(t *testing.T) {
	for name, text := range map[string]string{
		"length and chunks":     "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
		"two lengths":           "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
		"a list of lengths":     "HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\n",
		"a negative length":     "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
		"gzip, chunked":         "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
		"chunks in HTTP/1.0":    "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
		"a switch":              "HTTP/1.1 101 Switching Protocols\r\n\r\n",
		"HTTP/2":                "HTTP/2 200\r\n\r\n",
		"a status of two":       "HTTP/1.1 20 OK\r\n\r\n",
		"a status of four":      "HTTP/1.1 2000 OK\r\n\r\n",
		"status 099":            "HTTP/1.1 099 x\r\n\r\n",
		"a folded field":        "HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\r\n",
		"a bare line feed":      "HTTP/1.1 200 OK\nContent-Length: 5\r\n\r\n",
		"a bare return":         "HTTP/1.1 200 OK\r\nX: a\rb\r\n\r\n",
		"a zero byte":           "HTTP/1.1 200 OK\r\nX: \x00\r\n\r\n",
		"no status line":        "\r\n\r\n",
		"another protocol":      "SSH-2.0-OpenSSH\r\n",
		"a field without colon": "HTTP/1.1 200 OK\r\nX\r\n\r\n",
		"an endless head":       "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("y", HeadBytesMax),
		"a head beyond":         "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("y", HeadBytesMax) + "\r\n\r\n",
	} {
		_, n, err := ParseResponse([]byte(text), "GET")

		var refused *wire.Error
		if n != 0 || !errors.As(err, &refused) {
			t.Errorf("%s: %d bytes, %v", name, n, err)
		}
	}
}

// feed gives a body to d in pieces of size bytes. It returns how many bytes belong to it.
func feed(d *Body, text string, size int) (taken int, done bool, err error) {
	for taken < len(text) && !done && err == nil {
		var n int
		n, done, err = d.Feed([]byte(text[taken:min(len(text), taken+size)]))
		taken += n
	}
	return taken, done, err
}

func TestABodyEndsWhereItsFramingSays(t *testing.T) {
	for name, c := range map[string]struct {
		make  func() *Body
		text  string
		taken int
		done  bool
	}{
		"a length":              {func() *Body { return NewBody(5, false, false, 10) }, "helloGET", 5, true},
		"a length at its max":   {func() *Body { return NewBody(5, false, false, 5) }, "hello", 5, true},
		"a length cut":          {func() *Body { return NewBody(5, false, false, 10) }, "hel", 3, false},
		"until close":           {func() *Body { return NewBody(0, false, true, 10) }, "helloGET", 8, false},
		"no chunks":             {func() *Body { return NewBody(0, true, false, 10) }, "0\r\n\r\nGET", 5, true},
		"two chunks":            {func() *Body { return NewBody(0, true, false, 10) }, "3\r\nabc\r\n2\r\nde\r\n0\r\n\r\nGET", 20, true},
		"a size in hexadecimal": {func() *Body { return NewBody(0, true, false, 10) }, "A\r\n0123456789\r\n000\r\n\r\n", 22, true},
		"data like framing":     {func() *Body { return NewBody(0, true, false, 10) }, "5\r\n0\r\n\r\n\r\n0\r\n\r\n", 15, true},
		"chunks cut":            {func() *Body { return NewBody(0, true, false, 10) }, "3\r\nab", 5, false},
	} {
		for size := 1; size <= len(c.text); size++ {
			taken, done, err := feed(c.make(), c.text, size)
			if err != nil || taken != c.taken || done != c.done {
				t.Errorf("%s in pieces of %d: %d bytes, done %t, %v", name, size, taken, done, err)
			}
		}
	}
	if n, done, err := NewBody(0, false, false, 0).Feed([]byte("GET")); n != 0 || !done || err != nil {
		t.Errorf("no body: %d bytes, done %t, %v", n, done, err)
	}
}

func TestABodyThatTwoReadersWouldCutDifferentlyIsRefused(t *testing.T) {
	for name, c := range map[string]struct {
		text   string
		taken  int // of these many bytes the framing was right
		reason policy.Reason
	}{
		"an extension":            {"3;a=b\r\nabc\r\n", 1, "malformed"},
		"a space behind a size":   {"3 \r\nabc\r\n", 1, "malformed"},
		"a space before a size":   {" 3\r\nabc\r\n", 0, "malformed"},
		"a sign":                  {"+3\r\nabc\r\n", 0, "malformed"},
		"0x":                      {"0x3\r\nabc\r\n", 1, "malformed"},
		"an underscore":           {"1_0\r\n", 1, "malformed"},
		"no size":                 {"\r\nabc\r\n", 0, "malformed"},
		"a bare line feed":        {"3\nabc\r\n", 1, "malformed"},
		"a bare return":           {"3\rabc\r\n", 2, "malformed"},
		"data longer than stated": {"3\r\nabcd\r\n", 6, "malformed"},
		"a feed behind data":      {"3\r\nabc\n0\r\n\r\n", 6, "malformed"},
		"a trailer":               {"0\r\nX: y\r\n\r\n", 3, "malformed"},
		"a size of 16 digits":     {"0000000000000003\r\n", 15, "malformed"},
		"more than the bound":     {"b\r\n", 2, "too_large"},
		"more in sum":             {"9\r\n012345678\r\n2\r\n", 16, "too_large"},
	} {
		for size := 1; size <= len(c.text); size++ {
			taken, done, err := feed(NewBody(0, true, false, 10), c.text, size)

			var refused *wire.Error
			if done || taken != c.taken || !errors.As(err, &refused) || refused.Reason != c.reason {
				t.Errorf("%s in pieces of %d: %d bytes, done %t, %v", name, size, taken, done, err)
			}
		}
	}
	if n, _, err := NewBody(11, false, false, 10).Feed([]byte("0123456789a")); n != 0 || err == nil {
		t.Errorf("a length beyond the bound: %d bytes, %v", n, err)
	}
	if n, _, err := NewBody(0, false, true, 10).Feed([]byte("0123456789a")); n != 10 || err == nil {
		t.Errorf("a body until close beyond the bound: %d bytes, %v", n, err)
	}
}

// FuzzRequest: an accepted request is read the same by Go's server, in every split, and after it was written again.
func FuzzRequest(f *testing.F) {
	for _, text := range accepted {
		f.Add([]byte(text))
	}
	f.Add([]byte("GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"))
	f.Add([]byte("GET /a?b=%20&c HTTP/1.1\r\nHost: [::1]:80\r\nX: \t\r\n\r\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		head, n, err := ParseRequest(data)
		if err != nil {
			var refused *wire.Error
			if err != wire.ErrShort && !errors.As(err, &refused) {
				t.Fatalf("error of another kind: %v", err)
			}
			return
		}
		if _, _, err := ParseRequest(data[:n-1]); err != wire.ErrShort {
			t.Fatalf("without the last byte: %v", err)
		}
		var reused RequestHead
		for _, text := range []string{accepted["python requests"], string(data), "GET /x?y=1", string(data)} {
			_, err = reused.Parse([]byte(text))
		}
		for i := 0; i < n && n < 1024; i++ {
			if _, err := reused.Parse(data[:i]); err != wire.ErrShort {
				t.Fatalf("byte by byte, %d: %v", i, err)
			}
		}
		if n < 1024 {
			_, err = reused.Parse(data)
		}
		reused.text, head.text = nil, nil
		if want := fmt.Sprintf("%+v", *head); err != nil || fmt.Sprintf("%+v", reused) != want {
			t.Fatalf("a head that is used again reads %+v, %v; want %s", reused, err, want)
		}
		request, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(data[:n])))
		if err != nil {
			t.Fatalf("Go's server refuses what is accepted here: %v", err)
		}
		chunked := len(request.TransferEncoding) == 1
		if request.Method != head.Method || request.URL.Path != head.Path || strings.ToLower(request.Host) != head.Host ||
			chunked != head.Chunked || !chunked && request.ContentLength != head.ContentLength {
			t.Fatalf("Go's server reads %#v, this %#v", request, head)
		}
		written := head.Append(nil, nil)
		again, m, err := ParseRequest(written)
		if err == nil && m != len(written) {
			t.Fatalf("%q is read to byte %d", written, m)
		}
		if refused := new(wire.Error); errors.As(err, &refused) && refused.Reason == policy.ReasonTooLarge {
			return // "a:b" is written as "a: b"
		}
		if err != nil || again.Method != head.Method || again.Target != head.Target || again.Host != head.Host || again.ContentLength != head.ContentLength ||
			again.Chunked != head.Chunked || again.Close != head.Close || again.Upgrade != head.Upgrade || again.Expect != head.Expect || !reflect.DeepEqual(again.Query, head.Query) {
			t.Fatalf("%q is read as %#v, %v", written, again, err)
		}
	})
}

// FuzzResponse: the only errors are the declared ones, and Go's client sees the same end.
func FuzzResponse(f *testing.F) {
	for _, text := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "HTTP/1.0 404 Not Found\r\n\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
		"HTTP/1.1 100 Continue\r\n\r\n", "HTTP/1.1 204\r\nX: \xff\r\n\r\n",
	} {
		f.Add([]byte(text), "GET")
		f.Add([]byte(text), "HEAD")
	}
	f.Fuzz(func(t *testing.T, data []byte, method string) {
		head, n, err := ParseResponse(data, method)
		if err != nil {
			var refused *wire.Error
			if err != wire.ErrShort && !errors.As(err, &refused) {
				t.Fatalf("error of another kind: %v", err)
			}
			return
		}
		if n < 16 || n > len(data) || head.Status < 100 || head.Status > 999 || head.ContentLength < 0 {
			t.Fatalf("%d bytes, %#v", n, head)
		}
		response, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(data[:n])), &http.Request{Method: method})
		if err != nil || head.NoBody {
			return // Go is stricter about values, and has other words for answers without a body
		}
		chunked := len(response.TransferEncoding) == 1
		if chunked != head.Chunked || !chunked && !head.UntilClose && response.ContentLength != head.ContentLength {
			t.Fatalf("Go's client reads %#v, this %#v", response, head)
		}
	})
}

// FuzzBody: every split gives the same result, and Go's reader of chunks sees the same content and end.
func FuzzBody(f *testing.F) {
	for _, text := range []string{"0\r\n\r\n", "3\r\nabc\r\n2\r\nde\r\n0\r\n\r\nGET", "A\r\n0123456789\r\n000\r\n\r\n", "3;a\r\nabc\r\n"} {
		f.Add([]byte(text), uint8(1))
		f.Add([]byte(text), uint8(3))
	}
	f.Fuzz(func(t *testing.T, data []byte, size uint8) {
		const bound = 64
		whole, done, err := feed(NewBody(0, true, false, bound), string(data), len(data)+1)
		pieces, donePieces, errPieces := feed(NewBody(0, true, false, bound), string(data), int(size)+1)
		if whole != pieces || done != donePieces || (err == nil) != (errPieces == nil) {
			t.Fatalf("whole: %d, %t, %v; in pieces of %d: %d, %t, %v", whole, done, err, int(size)+1, pieces, donePieces, errPieces)
		}
		var refused *wire.Error
		if err != nil && !errors.As(err, &refused) {
			t.Fatalf("error of another kind: %v", err)
		}
		if !done {
			return
		}
		text := "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + string(data)
		buffered := bufio.NewReader(strings.NewReader(text))
		request, err := http.ReadRequest(buffered)
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(request.Body)
		if err != nil || len(content) > bound {
			t.Fatalf("Go's server reads %q, %v", content, err)
		}
		rest, err := io.ReadAll(buffered)
		if err != nil || string(rest) != string(data[whole:]) {
			t.Fatalf("behind the body Go's server has %q, %v; this %q", rest, err, data[whole:])
		}
	})
}
