package mysql

import (
	"testing"

	"kalium.dev/kalium/runtime/internal/wire/wiretest"
)

// recorded renders units for the recordings.
type recorded struct{ *Client }

var kinds = map[Kind]string{Support: "support", Message: "message", Prepare: "prepare", StartTLS: "start tls"}

func (r recorded) Next(b []byte) (int, string, error) {
	n, u, err := r.Client.Next(b)
	return n, kinds[u.Kind] + ": " + u.Text, err
}

// The recordings are of PyMySQL 1.2.4, mysql-connector-python 26.10.0 (pure) and 9.1.0 (C extension), mysql2 3.24.6 and
// MariaDB Connector/C 3.3.20 with MariaDB 10.11.19.
func TestUnmodifiedClientsAreFollowed(t *testing.T) {
	for _, path := range wiretest.Recordings(t) {
		for _, size := range []int{1 << 20, 7, 1} {
			wiretest.Replay(t, path, size, recorded{NewClient("other", "helloRetail")})
		}
	}
}
