package http1

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire"
)

const bodyMax = 1 << 20

// connection reads a whole connection as its holder does, which gets the bytes in pieces of size. It returns the request
// lines of what it let pass.
func connection(text string, size int) (passed []string, err error) {
	var head RequestHead
	var body Body
	inBody := false
	at := 0
	for end := 0; end < len(text); {
		end = min(len(text), end+size)
		for at < end {
			var n int
			if inBody {
				var done bool
				n, done, err = body.Feed([]byte(text[at:end]))
				inBody = !done
			} else {
				n, err = head.Parse([]byte(text[at:end]))
				if err == wire.ErrShort {
					break
				}
				if err == nil {
					passed = append(passed, strings.Clone(head.Method+" "+head.Target))
					inBody = head.Chunked || head.ContentLength > 0
					body.Reset(head.ContentLength, head.Chunked, false, bodyMax)
				}
			}
			if err != nil {
				return passed, err
			}
			at += n
		}
	}
	return passed, nil
}

// hidden is the request that the attacks below want to bring past the judge.
const hidden = "GET /admin HTTP/1.1\r\nHost: api\r\n\r\n"

func TestNoRequestIsSmuggled(t *testing.T) {
	post := func(fields, body string) string { return "POST /a HTTP/1.1\r\nHost: api\r\n" + fields + "\r\n" + body }
	chunks := func(body string) string { return post("Transfer-Encoding: chunked\r\n", body) }
	length := fmt.Sprintf("Content-Length: %d\r\n", len(hidden))
	websocket := "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
	for name, c := range map[string]struct {
		text   string
		reason policy.Reason
	}{
		"a length with chunks, CL.TE":         {post("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n"+hidden), "malformed"},
		"a length with chunks, TE.CL":         {post("Transfer-Encoding: chunked\r\n"+length, "1f\r\n"+hidden+"\r\n0\r\n\r\n"), "malformed"},
		"two lengths":                         {post("Content-Length: 0\r\n"+length, hidden), "malformed"},
		"two lengths in one":                  {post("Content-Length: 0, 33\r\n", hidden), "malformed"},
		"a length that is not digits: sign":   {post("Content-Length: +33\r\n", hidden), "malformed"},
		"a length that is not digits: hex":    {post("Content-Length: 0x21\r\n", hidden), "malformed"},
		"a length that is not digits: wide":   {post("Content-Length: \uff13\uff13\r\n", hidden), "malformed"},
		"a length that is not digits: space":  {post("Content-Length: 3 3\r\n", hidden), "malformed"},
		"a length that is not digits: quotes": {post("Content-Length: \"33\"\r\n", hidden), "malformed"},
		"a length that is too large":          {post("Content-Length: 18446744073709551616\r\n", hidden), "malformed"},
		"an encoding that is not chunked":     {post("Transfer-Encoding: identity\r\n", hidden), "malformed"},
		"an encoding that is obscured: x":     {post("Transfer-Encoding: xchunked\r\n", "0\r\n\r\n"+hidden), "malformed"},
		"an encoding that is obscured: list":  {post("Transfer-Encoding: chunked, identity\r\n", "0\r\n\r\n"+hidden), "malformed"},
		"an encoding that is obscured: feed":  {post("Transfer-Encoding: \x0cchunked\r\n", "0\r\n\r\n"+hidden), "malformed"},
		"an encoding that is obscured: name":  {post("Transfer_Encoding: chunked\r\n", "0\r\n\r\n"+hidden), "malformed"},
		"a bare line feed":                    {post("X: y\n"+length, hidden), "malformed"},
		"a bare line feed as the end":         {post("X: y\n\n"+hidden, ""), "malformed"},
		"a bare carriage return":              {post("X: y\r"+length, hidden), "malformed"},
		"a bare carriage return in a name":    {post("X\ry: z\r\n", ""), "malformed"},
		"a zero byte":                         {post("X: y\x00"+length, hidden), "malformed"},
		"a zero byte in the line":             {"GET /a\x00b HTTP/1.1\r\nHost: api\r\n\r\n", "malformed"},
		"a folded field":                      {post("X: y\r\n "+length, hidden), "malformed"},
		"a field folded with a tab":           {post("Transfer-Encoding:\r\n\tchunked\r\n", "0\r\n\r\n"+hidden), "malformed"},
		"a space before the colon":            {post("Content-Length : 33\r\n", hidden), "malformed"},
		"a tab before the colon":              {post("Transfer-Encoding\t: chunked\r\n", "0\r\n\r\n"+hidden), "malformed"},
		"a byte beyond ASCII in a value":      {post("X: \xc4\x8d\xc4\x8a"+length, hidden), "malformed"},
		"a byte beyond ASCII in a name":       {post("Content\xadLength: 33\r\n", hidden), "malformed"},
		"a byte beyond ASCII in the target":   {"GET /\xff HTTP/1.1\r\nHost: api\r\n\r\n", "malformed"},
		"an absolute target":                  {"GET http://api/a HTTP/1.1\r\nHost: api\r\n\r\n", "unsupported"},
		"an absolute target elsewhere":        {"GET http://other/a HTTP/1.1\r\nHost: api\r\n\r\n", "unsupported"},
		"several hosts that differ":           {"GET /a HTTP/1.1\r\nHost: api\r\nHost: other\r\n\r\n", "malformed"},
		"several hosts that are equal":        {"GET /a HTTP/1.1\r\nHost: api\r\nhost: api\r\n\r\n", "malformed"},
		"HTTP/0.9":                            {"GET /admin\r\n", "malformed"},
		"HTTP/1.0":                            {"GET /admin HTTP/1.0\r\n\r\n", "unsupported"},
		"a chunk extension":                   {chunks("1;x=\"\r\n\"\r\na\r\n0\r\n\r\n"), "malformed"},
		"an extension of the last chunk":      {chunks("0;" + hidden + "\r\n\r\n"), "malformed"},
		"white space behind a chunk size":     {chunks("0 \r\n\r\n" + hidden), "malformed"},
		"a chunk size that overflows":         {chunks("10000000000000000\r\n"), "malformed"},
		"a chunk size ended by a line feed":   {chunks("0\n\r\n" + hidden), "malformed"},
		"a chunk longer than it says":         {chunks("1\r\nab\r\n0\r\n\r\n"), "malformed"},
		"trailers":                            {chunks("0\r\nX: y\r\n\r\n"), "malformed"},
		"announced trailers":                  {post("Transfer-Encoding: chunked\r\nTrailer: X\r\n", "0\r\nX: y\r\n\r\n"), "unsupported"},
		"CONNECT":                             {"CONNECT other:25 HTTP/1.1\r\nHost: other:25\r\n\r\n", "unsupported"},
		"TRACE":                               {"TRACE /a HTTP/1.1\r\nHost: api\r\n\r\n", "unsupported"},
		"h2c":                                 {"GET /a HTTP/1.1\r\nHost: api\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n", "unsupported"},
		"h2c without its settings":            {"GET /a HTTP/1.1\r\nHost: api\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", "unsupported"},
		"the settings without h2c":            {"GET /a HTTP/1.1\r\nHost: api\r\nHTTP2-Settings: AAMAAABk\r\n\r\n", "unsupported"},
		"h2c by prior knowledge":              {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "unsupported"},
		"TLS inside":                          {"GET /a HTTP/1.1\r\nHost: api\r\nConnection: Upgrade\r\nUpgrade: TLS/1.0\r\n\r\n", "unsupported"},
		"a WebSocket and more":                {"GET /a HTTP/1.1\r\nHost: api\r\n" + strings.Replace(websocket, "websocket", "websocket, h2c", 1) + "\r\n", "unsupported"},
		"a WebSocket by POST":                 {post(websocket, ""), "unsupported"},
		"a body of a GET":                     {"GET /a HTTP/1.1\r\nHost: api\r\n" + length + "\r\n" + hidden, "unsupported"},
		"10,000 headers":                      {post(strings.Repeat("X: y\r\n", 10_000), ""), "too_large"},
		"10,000 bare names":                   {post(strings.Repeat("a:\r\n", 10_000), ""), "too_large"},
		"an oversize head":                    {post("X: "+strings.Repeat("y", HeadBytesMax)+"\r\n", ""), "too_large"},
		"an oversize target":                  {"GET /" + strings.Repeat("a", HeadBytesMax) + " HTTP/1.1\r\nHost: api\r\n\r\n", "too_large"},
		"an endless chunk":                    {chunks("fffffffffffffff\r\n"), "too_large"},
		"endless chunks":                      {chunks(strings.Repeat("1\r\na\r\n", bodyMax+1)), "too_large"},
		"an endless chunk size":               {chunks(strings.Repeat("0", 100)), "malformed"},
		"an endless body":                     {post("Content-Length: 999999999999999999\r\n", "a"), "too_large"},
	} {
		sizes := []int{len(c.text), 7, 1}
		if len(c.text) > bodyMax {
			sizes = sizes[:2]
		}
		for _, size := range sizes {
			// What comes before a fault in a body may have passed, but nothing that hides behind it.
			passed, err := connection(c.text, size)

			var refused *wire.Error
			if !errors.As(err, &refused) || refused.Reason != c.reason || len(passed) > 1 || len(passed) == 1 && passed[0] != "POST /a" {
				t.Errorf("%s in pieces of %d: passed %q, %v; want %s", name, size, passed, err, c.reason)
			}
		}
	}
}

func TestPipelinedRequestsAreAllRead(t *testing.T) {
	text := "POST /a HTTP/1.1\r\nHost: api\r\nTransfer-Encoding: chunked\r\n\r\n1f\r\n" + hidden[:31] + "\r\n0\r\n\r\n" +
		"PUT /b HTTP/1.1\r\nHost: api\r\nContent-Length: 32\r\n\r\n" + hidden[:32] + "POST /c HTTP/1.1\r\nHost: api\r\nContent-Length: 0\r\n\r\n" + hidden
	for size := 1; size <= len(text); size++ {
		passed, err := connection(text, size)
		if want := "POST /a, PUT /b, POST /c, GET /admin"; err != nil || strings.Join(passed, ", ") != want {
			t.Fatalf("in pieces of %d: %q, %v", size, passed, err)
		}
	}
}

func TestAHeadInSingleBytesCostsLittle(t *testing.T) {
	text := simple[:len(simple)-2] + "X: " + strings.Repeat("y", HeadBytesMax-len(simple)-5) + "\r\n\r\n"
	began := time.Now()
	passed, err := connection(text, 1)
	if took := time.Since(began); err != nil || len(passed) != 1 || took > 10*time.Second {
		t.Errorf("%q, %v, in %s", passed, err, took)
	}
}

func TestAWebSocketUpgradeIsNamed(t *testing.T) {
	request := func(lines ...string) string {
		return "GET /chat HTTP/1.1\r\nHost: api\r\n" + strings.Join(lines, "\r\n") + "\r\n\r\n"
	}
	const upgrade, connection, key, version = "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13"
	for name, text := range map[string]string{
		"Python's websockets": request(upgrade, connection, key, version, "Sec-WebSocket-Extensions: permessage-deflate"),
		"Firefox":             request(version, key, "Connection: keep-alive, Upgrade", upgrade, "Sec-WebSocket-Protocol: chat"),
		"curl":                request("Upgrade: WebSocket", "connection: upgrade", "sec-websocket-version: 13", "SEC-WEBSOCKET-KEY: AAAAAAAAAAAAAAAAAAAAAA=="),
	} {
		head, n, err := ParseRequest([]byte(text + "rest"))
		if err != nil || n != len(text) || head.Upgrade != "websocket" || head.Close {
			t.Errorf("%s: %d bytes, %#v, %v", name, n, head, err)
		}
		if written := head.Append(nil, nil); err == nil && !strings.Contains(string(written), "\r\nConnection: Upgrade\r\n") {
			t.Errorf("%s: written as %q", name, written)
		}
		var refused *wire.Error
		if _, _, err := ParseIncoming([]byte(text)); !errors.As(err, &refused) || refused.Reason != "unsupported" {
			t.Errorf("%s to a function: %v", name, err)
		}
	}
	for name, text := range map[string]string{
		"no connection":     request(upgrade, key, version),
		"a proxy's":         request(upgrade, "Connection: keep-alive", key, version),
		"no upgrade":        request(connection, key, version),
		"two upgrades":      request(upgrade, upgrade, connection, key, version),
		"no key":            request(upgrade, connection, version),
		"two keys":          request(upgrade, connection, key, key, version),
		"a key of 15 bytes": request(upgrade, connection, "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAA", version),
		"a key with a word": request(upgrade, connection, "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAB==", version),
		"no version":        request(upgrade, connection, key),
		"version 8":         request(upgrade, connection, key, "Sec-WebSocket-Version: 8"),
		"two versions":      request(upgrade, connection, key, version, version),
		"and close":         request(upgrade, "Connection: Upgrade, close", key, version),
		"with a body":       request(upgrade, connection, key, version, "Content-Length: 5"),
	} {
		var refused *wire.Error
		if head, _, err := ParseRequest([]byte(text)); !errors.As(err, &refused) || refused.Reason != "unsupported" {
			t.Errorf("%s: %#v, %v", name, head, err)
		}
	}
}

func TestAHeadIsUsedAgain(t *testing.T) {
	var head RequestHead
	for range 2 {
		for name, text := range accepted {
			want, n, err := ParseRequest([]byte(text))
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			data := []byte(text)
			if m, err := head.Parse(data); err != nil || m != n {
				t.Fatalf("%s: %d bytes, %v", name, m, err)
			}
			for i := range data {
				data[i] = 'x' // the caller's bytes are the caller's again
			}
			if got, want := fmt.Sprintf("%+v", head), fmt.Sprintf("%+v", *want); got != want {
				t.Errorf("%s: %s, want %s", name, got, want)
			}
			if _, err := head.Parse([]byte("GET /a/../b HTTP/1.1\r\nHost: api\r\n\r\n")); err == nil {
				t.Error("a refused head is read")
			}
		}
	}
}

func TestReadingCostsNoMemoryOnceWarm(t *testing.T) {
	var head RequestHead
	var body Body
	for name, data := range map[string][]byte{"a POST": oneKiB, "a long head": wholeHead} {
		if allocations := testing.AllocsPerRun(100, func() {
			n, err := head.Parse(data)
			if err != nil {
				t.Fatal(err)
			}
			body.Reset(head.ContentLength, head.Chunked, false, bodyMax)
			if _, done, err := body.Feed(data[n:]); !done || err != nil {
				t.Fatal(done, err)
			}
		}); allocations != 0 {
			t.Errorf("%s: %v allocations", name, allocations)
		}
	}
}
