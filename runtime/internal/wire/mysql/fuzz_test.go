package mysql

import (
	"bytes"
	"errors"
	"slices"
	"testing"

	"kalium.dev/kalium/runtime/internal/wire"
	"kalium.dev/kalium/runtime/internal/wire/wiretest"
)

// FuzzClient: the only errors are the declared ones, every split gives the same units and the same bytes, and what is a
// message says what it does. The server speaks before the client, and again behind each unit.
func FuzzClient(f *testing.F) {
	greeting := greetingOf(clientSSL | clientDeprecateEOF)
	request, inside := tls(nil)
	f.Add(slices.Concat(of(nil).build(), packet(3, make([]byte, 20)...), query("SELECT a FROM t"), packet(0, comQuit)), []byte(nil), uint8(1))
	f.Add(slices.Concat(of(nil).build(), query("INSERT INTO t (a) SELECT b FROM u"), packet(0, comPing)), greeting, uint8(7))
	f.Add(slices.Concat(of(nil).build(), prepareOf("SELECT ?"), executeOf(1)), slices.Concat(greeting, packet(2, okPacket...), preparedOK(1, 0, 0)), uint8(3))
	f.Add(slices.Concat(request, inside, prepareOf("DELETE FROM t"), executeOf(7), numbered(comStmtClose, 7)), greeting, uint8(5))
	f.Add(slices.Concat(of(nil).build(), prepareOf("SELECT a FROM t"), numbered(comStmtSendLongData, 1, 0, 0, 1), executeOf(last)), greeting, uint8(200))
	for _, path := range wiretest.Recordings(f) {
		f.Add(wiretest.Client(f, path), greeting, uint8(50))
	}
	f.Fuzz(func(t *testing.T, stream, server []byte, size uint8) {
		follow := func(size int) (units []Unit, sent []byte, last error) {
			client := NewClient("other", "helloRetail")
			said := server
			say := func(n int) {
				client.Server(said[:min(n, len(said))])
				said = said[min(n, len(said)):]
			}
			say(len(greeting))
			data := bytes.Clone(stream)
			for end := 0; end < len(data) && (last == nil || last == wire.ErrShort); {
				end = min(len(data), end+size)
				for len(sent) < end {
					var n int
					var u Unit
					if n, u, last = client.Next(data[len(sent):end]); last != nil {
						break
					}
					units, sent = append(units, u), append(sent, data[len(sent):len(sent)+n]...)
					say(16)
				}
			}
			client.Server(said)
			if n := len(client.statements.known); n > statementsMax || client.statements.names > statementNamesMax || n > 0 && client.statements.isBlind {
				t.Fatalf("%d statements, %d bytes, blind %v", n, client.statements.names, client.statements.isBlind)
			}
			return units, sent, last
		}
		whole, sent, err := follow(len(stream) + 1)
		pieces, sentPieces, errPieces := follow(int(size) + 1)
		same := slices.EqualFunc(whole, pieces, func(a, b Unit) bool {
			return a.Kind == b.Kind && a.Text == b.Text && a.Verb == b.Verb && slices.Equal(a.Read, b.Read) && slices.Equal(a.Write, b.Write)
		})
		if !same || !bytes.Equal(sent, sentPieces) || (err == nil) != (errPieces == nil) {
			t.Fatalf("whole: %d units, %d bytes, %v; in pieces of %d: %d, %d, %v", len(whole), len(sent), err, int(size)+1, len(pieces), len(sentPieces), errPieces)
		}
		var refused *wire.Error
		if err != nil && err != wire.ErrShort && !errors.As(err, &refused) {
			t.Fatalf("error of another kind: %v", err)
		}
		for i, u := range whole {
			if (u.Kind == Message || u.Kind == Prepare) != (u.Verb != "") || u.Kind == 0 || u.Text == "" || i == 0 && u.Verb != "" {
				t.Fatalf("unit %d: %#v", i, u)
			}
		}
	})
}
