package http2

import (
	"slices"
	"strconv"
	"strings"
	"testing"
)

// requestLines are a request of 1 KiB, head and body, as python-httpx writes it; the path is another each time.
func requestLines(i int) []string {
	return append(slices.Clone(postLines[:3]), ":path: /function/f?photo="+strconv.Itoa(i)+"&size=20", "accept: */*", "accept-encoding: gzip, deflate, br",
		"user-agent: python-httpx/0.27.0", "x-call-id: 6f1c2a", "content-type: application/json", "content-length: 760")
}

// BenchmarkNext1KiB reads requests of 1 KiB on one connection, its head and its body, once the tables are warm.
func BenchmarkNext1KiB(b *testing.B) {
	const warm, requests = 16, 1000
	s := begun()
	var at []int
	for i := range warm + requests {
		at = append(at, s.Len())
		s.frame(frameHeaders, flagEndHeaders, uint32(2*i+1), s.fields(requestLines(i)...))
		s.data(uint32(2*i+1), true, strings.Repeat("x", 760))
	}
	data := s.Bytes()
	b.SetBytes(int64(len(data)-at[warm]) / requests)
	b.ReportAllocs()
	var client *Client
	for next := len(at); b.Loop(); {
		if next == len(at) {
			b.StopTimer()
			client, next = NewClient(), warm
			readAll(b, client, data[:at[warm]])
			b.StartTimer()
		}
		end := len(data)
		if next+1 < len(at) {
			end = at[next+1]
		}
		readAll(b, client, data[at[next]:end])
		next++
	}
}

func readAll(b *testing.B, client *Client, data []byte) {
	for len(data) > 0 {
		n, _, err := client.Next(data)
		if err != nil {
			b.Fatal(err)
		}
		data = data[n:]
	}
}
