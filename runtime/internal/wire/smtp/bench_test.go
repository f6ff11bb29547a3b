package smtp

import (
	"bytes"
	"testing"
)

func BenchmarkText(b *testing.B) {
	data := bytes.Repeat([]byte("The quick brown fox jumps over the lazy dog and then writes base64\r\n"), 1000)
	for name, inTLS := range map[string]bool{"clear": false, "TLS": true} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			c := Client{phase: inText, inTLS: inTLS}
			for b.Loop() {
				if n, _, err := c.Next(data); n != len(data) || err != nil {
					b.Fatal(n, err)
				}
			}
		})
	}
}
