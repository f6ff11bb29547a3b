package guard

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"sync"
	"time"
)

const (
	authorityLasts = 10 * 365 * 24 * time.Hour // longer than any sandbox; the key is gone with it
	leafLasts      = 24 * time.Hour
	leavesMax      = 256 // hosts whose certificates are kept
	clockSlack     = time.Hour
)

// authority signs what a program is shown in place of its peer's certificate. It is made for one sandbox, and its keys are
// in the Sentry's memory only, so nobody else can be deceived by it. It is not constrained to the names of the policy: a
// newer version may add some while programs have the certificate already, and the guard asks for those of peers only.
//
// It also has the roots by which the guard checks the peers themselves.
type authority struct {
	key   *ecdsa.PrivateKey
	cert  *x509.Certificate
	roots []byte // PEM

	parse sync.Once
	pool  *x509.CertPool // nil: nothing is trusted

	mu      sync.Mutex
	leafKey *ecdsa.PrivateKey
	leaves  map[string]*tls.Certificate
}

func newAuthority(sandbox string, roots []byte) (*authority, error) {
	a := &authority{roots: roots, leaves: map[string]*tls.Certificate{}}
	var err error
	if a.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, fmt.Errorf("the sandbox's authority: %w", err)
	}
	if a.leafKey, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, fmt.Errorf("the sandbox's authority: %w", err)
	}
	template := &x509.Certificate{
		Subject:   pkix.Name{CommonName: "Kalium sandbox " + sandbox[:min(len(sandbox), 32)]},
		NotBefore: time.Now().Add(-clockSlack), NotAfter: time.Now().Add(authorityLasts),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign,
	}
	raw, err := a.sign(template, template, &a.key.PublicKey)
	if err != nil {
		return nil, err
	}
	a.cert, err = x509.ParseCertificate(raw)
	return a, err
}

func (a *authority) sign(template, parent *x509.Certificate, key *ecdsa.PublicKey) ([]byte, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, fmt.Errorf("a certificate's number: %w", err)
	}
	template.SerialNumber = serial
	raw, err := x509.CreateCertificate(rand.Reader, template, parent, key, a.key)
	if err != nil {
		return nil, fmt.Errorf("a certificate of the sandbox's authority: %w", err)
	}
	return raw, nil
}

// leaf is the certificate for a host. It is used again until half of its time is over.
func (a *authority) leaf(host string) (*tls.Certificate, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	if kept := a.leaves[host]; kept != nil && now.Before(kept.Leaf.NotAfter.Add(-leafLasts/2)) {
		return kept, nil
	}
	raw, err := a.sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: "Kalium"}, DNSNames: []string{host},
		NotBefore: now.Add(-clockSlack), NotAfter: now.Add(leafLasts),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, a.cert, &a.leafKey.PublicKey)
	if err != nil {
		return nil, err
	}
	parsed, err := x509.ParseCertificate(raw)
	if err != nil {
		return nil, err
	}
	if len(a.leaves) >= leavesMax {
		clear(a.leaves)
	}
	made := &tls.Certificate{Certificate: [][]byte{raw}, PrivateKey: a.leafKey, Leaf: parsed}
	a.leaves[host] = made
	return made, nil
}

// trusted is what servers are checked with. nil: there is nothing, so none is accepted.
func (a *authority) trusted() *x509.CertPool {
	a.parse.Do(func() {
		pool := x509.NewCertPool()
		if pool.AppendCertsFromPEM(a.roots) {
			a.pool = pool
		}
	})
	return a.pool
}

// Trust is what programs should trust whose TLS ends in the guard, in PEM: the sandbox's authority first, and behind it the
// roots by which the guard itself checks servers. Connections that the guard leaves alone, as in mode off, need those.
func (g *Guard) Trust() []byte {
	if g == nil {
		return nil
	}
	own := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: g.authority.cert.Raw})
	return append(own, g.authority.roots...)
}

// Terminates tells whether the policy in force ends the function's TLS in the guard.
func (g *Guard) Terminates() bool {
	s := g.stand()
	return s.function != nil && s.function.Terminate
}
