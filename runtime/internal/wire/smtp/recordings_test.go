package smtp

import (
	"fmt"
	"testing"

	"kalium.dev/kalium/runtime/internal/wire/wiretest"
)

// recorded renders units for the recordings. Text comes in as many units as the bytes have pieces, so only its end is
// compared.
type recorded struct {
	*Client
	text int
}

var kinds = map[Kind]string{Support: "support", Envelope: "envelope", Mail: "mail", Body: "body", StartTLS: "start tls"}

func (r *recorded) Next(b []byte) (int, string, error) {
	n, u, err := r.Client.Next(b)
	if err != nil || u.Kind != Body {
		return n, kinds[u.Kind] + ": " + u.Text, err
	}
	if r.text += u.Bytes; !u.End {
		return n, "", nil
	}
	total := r.text
	r.text = 0
	return n, fmt.Sprintf("body: %d bytes", total), nil
}

// The recordings are of Python 3.11's smtplib, nodemailer and a pipelining client with aiosmtpd 1.4.6.
func TestUnmodifiedClientsAreFollowed(t *testing.T) {
	for _, path := range wiretest.Recordings(t) {
		for _, size := range []int{1 << 20, 7, 1} {
			wiretest.Replay(t, path, size, &recorded{Client: NewClient()})
		}
	}
}
