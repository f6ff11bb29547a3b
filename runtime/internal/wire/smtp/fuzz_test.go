package smtp

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"kalium.dev/kalium/runtime/internal/wire"
	"kalium.dev/kalium/runtime/internal/wire/wiretest"
)

// FuzzClient: the only errors are the declared ones, every split gives the same units, and no mail is sent whose envelope
// was not asked about. The server speaks a reply's line before the client and behind each of its units.
func FuzzClient(f *testing.F) {
	const server = "220 mail\r\n250-mail\r\n250 CHUNKING\r\n250 ok\r\n250 ok\r\n354 go on\r\n250 ok\r\n221 bye\r\n"
	for _, path := range wiretest.Recordings(f) {
		f.Add(wiretest.Client(f, path), []byte(server), uint8(30))
	}
	f.Add([]byte("EHLO f\r\nMAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\nBDAT 3\r\nx\r\nBDAT 2 LAST\r\ny\r\n"), []byte(server), uint8(2))
	f.Add([]byte("EHLO f\r\nSTARTTLS\r\nAUTH LOGIN\r\nYQ==\r\nMAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\nDATA\r\nx\r\n.\r\nMAIL FROM:<a@x>\r\n"), []byte("220 a\r\n250 a\r\n220 go\r\n"), uint8(9))
	f.Add([]byte("EHLO f\r\nAUTH PLAIN\r\nYQ==\r\nRSET\r\nQUIT\r\n"), []byte("220 a\r\n250 a\r\n334 \r\n235 a\r\n"), uint8(1))
	f.Fuzz(func(t *testing.T, stream, server []byte, size uint8) {
		follow := func(size int) (units []Unit, taken int, last error) {
			client := NewClient()
			said := server
			say := func() {
				for more := true; more && len(said) > 0; {
					line := said[:min(len(said), 1+strings.IndexByte(string(said)+"\n", '\n'))]
					more = len(line) > 3 && line[3] == '-'
					client.Server(line)
					said = said[len(line):]
				}
			}
			say()
			body := 0
			for end := 0; end < len(stream) && (last == nil || last == wire.ErrShort); {
				end = min(len(stream), end+size)
				for taken < end {
					var n int
					var u Unit
					if n, u, last = client.Next(stream[taken:end]); last != nil {
						break
					}
					if n <= 0 || n > end-taken || u.Kind == 0 || u.Text == "" || u.Bytes > n {
						t.Fatalf("%d bytes, %#v", n, u)
					}
					taken += n
					if u.Kind == Body {
						body += u.Bytes
						if !u.End {
							continue
						}
						u.Bytes, body = body, 0
					}
					units = append(units, u)
					say()
				}
			}
			if client.replies.open > commandsMax || len(client.to) > recipientsMax {
				t.Fatalf("%d commands, %d recipients", client.replies.open, len(client.to))
			}
			return units, taken, last
		}
		whole, taken, err := follow(len(stream) + 1)
		pieces, takenPieces, errPieces := follow(int(size) + 1)
		if !slices.EqualFunc(whole, pieces, equal) || (err == nil) != (errPieces == nil) || err == nil && taken != takenPieces {
			t.Fatalf("whole: %d units, %d bytes, %v; in pieces of %d: %d, %d, %v", len(whole), taken, err, int(size)+1, len(pieces), takenPieces, errPieces)
		}
		var refused *wire.Error
		if err != nil && err != wire.ErrShort && !errors.As(err, &refused) {
			t.Fatalf("error of another kind: %v", err)
		}
		var asked Unit
		for _, u := range whole {
			switch u.Kind {
			case Envelope:
				asked = u
			case Mail:
				if u.From == "" || len(u.To) == 0 || u.From != asked.From || !slices.Equal(u.To, asked.To) || !slices.IsSorted(u.To) {
					t.Fatalf("%#v behind %#v", u, asked)
				}
			}
		}
	})
}
