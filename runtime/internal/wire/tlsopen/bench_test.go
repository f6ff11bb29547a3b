package tlsopen

import (
	"fmt"
	"testing"
	"time"
)

// perSuite runs a benchmark for each suite and size of content.
func perSuite(b *testing.B, run func(b *testing.B, s *script, content []byte)) {
	for _, number := range allSuites {
		name := map[uint16]string{
			aes128TLS13: "TLS13-AES128", aes256TLS13: "TLS13-AES256", chachaTLS13: "TLS13-ChaCha20",
			aes128TLS12: "TLS12-AES128", aes256TLS12: "TLS12-AES256", chachaTLS12: "TLS12-ChaCha20",
		}[number]
		for _, n := range []int{128, 1024, 16384} {
			b.Run(fmt.Sprintf("%s/%d", name, n), func(b *testing.B) {
				s := protectedBy(b, number)
				s.pass(s.seal(contentApplicationData, make([]byte, fragmentBytes)), KindData)
				b.SetBytes(int64(n))
				b.ReportAllocs()
				run(b, s, make([]byte, n))
			})
		}
	}
}

// openSeal opens a record and seals it again. The same record comes again and again, so it is copied each time.
func openSeal(b *testing.B, s *script, content []byte) func() {
	at := s.client.opening.sequence
	sealed := s.seal(contentApplicationData, content)
	buffer, dst := make([]byte, len(sealed)), make([]byte, 0, 2*len(sealed))
	return func() {
		copy(buffer, sealed)
		s.client.opening.sequence = at
		_, u, err := s.client.Next(buffer)
		if err != nil {
			b.Fatal(err)
		}
		dst = s.client.Seal(dst[:0], u.Data)
	}
}

// aeadFloor is what no code can do without: Go's own AEAD opens and seals the same bytes, copied as above. In TLS 1.3 the
// content type is one of them.
func aeadFloor(b *testing.B, s *script, content []byte) func() {
	p := s.sending
	p.setNonce()
	content = append(content, make([]byte, p.suite.overhead-p.suite.explicit-tagBytes)...)
	sealed := p.aead.Seal(nil, p.nonce[:], content, p.additional[:])
	buffer, dst := make([]byte, len(sealed)), make([]byte, 0, 2*len(sealed))
	return func() {
		copy(buffer, sealed)
		opened, err := p.aead.Open(buffer[:0], p.nonce[:], buffer, p.additional[:])
		if err != nil {
			b.Fatal(err)
		}
		dst = p.aead.Seal(dst[:0], p.nonce[:], opened, p.additional[:])
	}
}

func BenchmarkOpenSeal(b *testing.B) {
	perSuite(b, func(b *testing.B, s *script, content []byte) {
		for run := openSeal(b, s, content); b.Loop(); {
			run()
		}
	})
}

func BenchmarkAEADFloor(b *testing.B) {
	perSuite(b, func(b *testing.B, s *script, content []byte) {
		for run := aeadFloor(b, s, content); b.Loop(); {
			run()
		}
	})
}

// BenchmarkOverFloor compares the two in turns, so that what else the machine does falls on both. The ratio is that of
// their fastest turns.
func BenchmarkOverFloor(b *testing.B) {
	const turn = 20
	perSuite(b, func(b *testing.B, s *script, content []byte) {
		var best [2]time.Duration
		turns := [2]func(){openSeal(b, s, content), aeadFloor(b, s, content)}
		for b.Loop() {
			for i, run := range turns {
				begun := time.Now()
				for range turn {
					run()
				}
				if took := time.Since(begun); best[i] == 0 || took < best[i] {
					best[i] = took
				}
			}
		}
		b.ReportMetric(float64(best[0])/turn, "open+seal-ns")
		b.ReportMetric(float64(best[1])/turn, "floor-ns")
		b.ReportMetric(float64(best[0])/float64(best[1]), "ratio")
	})
}

// BenchmarkKeys is what a connection costs once.
func BenchmarkKeys(b *testing.B) {
	suite := suites[aes256TLS13]
	secret := make([]byte, suite.digest)
	for b.Loop() {
		if _, err := suite.traffic(secret); err != nil {
			b.Fatal(err)
		}
	}
}

func TestOpenAndSealDoNotAllocate(t *testing.T) {
	for _, number := range allSuites {
		s := protectedBy(t, number)
		s.pass(s.seal(contentApplicationData, make([]byte, fragmentBytes)), KindData)
		const runs = 100
		var records [][]byte
		for range runs + 1 { // AllocsPerRun runs once more
			records = append(records, s.seal(contentApplicationData, make([]byte, 1000)))
		}
		dst := make([]byte, 0, 2000)
		if n := testing.AllocsPerRun(runs, func() {
			_, u, err := s.client.Next(records[0])
			if err != nil {
				t.Fatal(err)
			}
			records = records[1:]
			dst = s.client.Seal(dst[:0], u.Data)
		}); n != 0 {
			t.Errorf("%#04x: %v allocations per record", number, n)
		}
	}
}
