package agent

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
)

// readRoots reads the certificates by which guards check servers, at path. What else stands in the file is left out.
func readRoots(path string) ([]byte, error) {
	data, err := readBounded(path, rootsBytesMax)
	if err != nil {
		return nil, err
	}
	var roots []byte
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("a PEM block %.40q, not only certificates", block.Type)
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return nil, err
		}
		roots = append(roots, pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: block.Bytes})...)
	}
	if len(roots) == 0 {
		return nil, errors.New("no certificate in PEM")
	}
	return roots, nil
}

// checkRoots says at the start what would be missing later.
func (c *Config) checkRoots() error {
	if c.TLSRoots == "" {
		return nil
	}
	if _, err := readRoots(c.TLSRoots); err != nil {
		return environment("agent.config", "cannot read the trust roots "+c.TLSRoots,
			"name a file of certificates in PEM as `tls_roots`, with no more than guards can be told, or leave the field empty", "%v", err)
	}
	return nil
}

// roots are those for a guard that ends its function's TLS. They are read anew, since a site may renew its authority;
// without them such a guard refuses every server.
func (a *Agent) roots(terminates bool) []byte {
	if !terminates || a.config.TLSRoots == "" {
		return []byte{}
	}
	roots, err := readRoots(a.config.TLSRoots)
	if err != nil {
		a.log.Error(eventRoots, keyError, err)
		return []byte{}
	}
	return roots
}
