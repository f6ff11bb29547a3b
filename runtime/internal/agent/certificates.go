package agent

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"kalium.dev/kalium/runtime/internal/policy"
)

// Roles of certificates: the host of their only URI, as in kalium://controller/NAME.
const (
	roleAgent      = "agent"
	roleController = "controller"
)

// dial connects to a controller. Certificates are read each time, so that new ones come into force without a restart; expires
// is when the first of both sides' does.
func dial(ctx context.Context, config *Config, controller Controller) (conn net.Conn, expires time.Time, err error) {
	roots, own, err := readPair(config)
	if err != nil {
		return nil, time.Time{}, err
	}
	dialer := tls.Dialer{Config: &tls.Config{
		MinVersion: tls.VersionTLS13, RootCAs: roots, ServerName: controller.Name, Certificates: []tls.Certificate{*own},
		VerifyConnection: func(state tls.ConnectionState) error {
			return checkRole(state.PeerCertificates[0], roleController, "")
		},
	}}
	dialed, err := dialer.DialContext(ctx, "tcp", controller.Address)
	if err != nil {
		return nil, time.Time{}, err
	}
	secured := dialed.(*tls.Conn) // as its documentation says
	expires = own.Leaf.NotAfter
	if theirs := secured.ConnectionState().PeerCertificates[0].NotAfter; theirs.Before(expires) {
		expires = theirs
	}
	return secured, expires, nil
}

// readPair reads the CA and the agent's own pair. What a controller would refuse is refused here, where the reason is plain.
func readPair(config *Config) (*x509.CertPool, *tls.Certificate, error) {
	authority, err := readBounded(config.TLS.CA, configBytesMax)
	if err != nil {
		return nil, nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(authority) {
		return nil, nil, fmt.Errorf("%s holds no certificate", config.TLS.CA)
	}
	own, err := tls.LoadX509KeyPair(config.TLS.Cert, config.TLS.Key)
	if err != nil {
		return nil, nil, fmt.Errorf("the agent's own pair %s: %w", config.TLS.Cert, err)
	}
	_, err = own.Leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	if err == nil {
		err = checkRole(own.Leaf, roleAgent, config.Node)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("the agent's own certificate %s: %w", config.TLS.Cert, err)
	}
	return roots, &own, nil
}

var errRole = errors.New("the certificate is for somebody else")

// checkRole refuses a certificate that its CA has not issued for this role, and for this name unless name is "".
func checkRole(certificate *x509.Certificate, role, name string) error {
	var found []string
	for _, uri := range certificate.URIs {
		found = append(found, uri.String())
	}
	begin := "kalium://" + role + "/"
	if len(found) == 1 && strings.HasPrefix(found[0], begin) {
		if is := found[0][len(begin):]; is != "" && (name == "" || is == name) {
			return nil
		}
	}
	wanted := begin + name
	if name == "" {
		wanted = begin + "NAME"
	}
	return fmt.Errorf("%w: its URIs are %q, not only %s", errRole, policy.Printable(strings.Join(found, " "), logTextMax), wanted)
}
