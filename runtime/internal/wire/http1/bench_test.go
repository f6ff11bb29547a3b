package http1

import (
	"strings"
	"testing"
)

// oneKiB is a POST whose head and body have 1 KiB together, as python-requests writes it.
var oneKiB = func() []byte {
	head := "POST /function/f?photo=17&size=20 HTTP/1.1\r\nHost: api.example:8443\r\nUser-Agent: python-requests/2.31.0\r\nAccept-Encoding: gzip, deflate\r\n" +
		"Accept: */*\r\nConnection: keep-alive\r\nX-Call-Id: 6f1c2a\r\nContent-Type: application/json\r\nContent-Length: 777\r\n\r\n"
	return []byte(head + strings.Repeat("x", 1024-len(head)))
}()

// wholeHead is a head of 1 KiB.
var wholeHead = []byte(simple[:len(simple)-2] + "Cookie: " + strings.Repeat("c", 1024-len(simple)-10) + "\r\n\r\n")

func BenchmarkParseRequest1KiB(b *testing.B) {
	for name, data := range map[string][]byte{"head and body": oneKiB, "head": wholeHead} {
		b.Run(name, func(b *testing.B) {
			var head RequestHead
			var body Body
			b.ReportAllocs()
			b.SetBytes(int64(len(data)))
			for b.Loop() {
				n, err := head.Parse(data)
				if err != nil {
					b.Fatal(err)
				}
				body.Reset(head.ContentLength, head.Chunked, false, 1<<20)
				if _, done, err := body.Feed(data[n:]); !done || err != nil {
					b.Fatal(done, err)
				}
			}
		})
	}
}
