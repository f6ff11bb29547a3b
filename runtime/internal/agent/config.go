package agent

import (
	"bytes"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"kalium.dev/kalium/runtime/internal/policy"
)

// DefaultConfigPath is where site.yml writes the configuration.
const DefaultConfigPath = "/etc/kalium/agent.json"

// Config is the content of agent.json; docs/reference/agent.md explains the fields.
type Config struct {
	Node           string              `json:"node"`
	GuardSocket    string              `json:"guard_socket"`
	RegisterSocket string              `json:"register_socket"`
	Controller     Controller          `json:"controller"`
	OperatorKey    string              `json:"operator_key"`
	StateDir       string              `json:"state_dir"`
	VerdictLog     string              `json:"verdict_log"`
	TimingLog      string              `json:"timing_log"`
	Names          map[string][]string `json:"names"`
	Incoming       Incoming            `json:"incoming"`
	LeaseMS        int                 `json:"lease_ms"`
	TLSRoots       string              `json:"tls_roots"`     // "": none
	AdmitWaitMS    int                 `json:"admit_wait_ms"` // 0: a hello before its registration is refused at once

	// peerUID is whose processes may use the sockets: root's. Tests that do not run as root set another one.
	peerUID uint32
}

// Controller says where the controller is and how both sides prove who they are.
type Controller struct {
	Address string `json:"address"`
	Name    string `json:"name"` // in the controller's certificate
	CA      string `json:"ca"`
	Cert    string `json:"cert"`
	Key     string `json:"key"`
}

// Incoming says on which port and from where invocations reach an instance.
type Incoming struct {
	Port       int      `json:"port"`
	Sources    []string `json:"sources"`
	HealthPath string   `json:"health_path"`
}

// LoadConfig reads and checks the file at path.
func LoadConfig(path string) (*Config, error) {
	refuse := func(format string, args ...any) error {
		return environment("agent.config", "cannot read the configuration "+path,
			"correct the file, or run `ansible-playbook site.yml`, which writes it", format, args...)
	}
	data, err := readBounded(path, configBytesMax)
	if err != nil {
		return nil, refuse("%v", err)
	}
	config, err := parseConfig(data)
	if err != nil {
		return nil, refuse("%v", err)
	}
	return config, nil
}

func readBounded(path string, max int64) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, max+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if int64(len(data)) > max {
		return nil, fmt.Errorf("%s has more than %d bytes", path, max)
	}
	return data, nil
}

func parseConfig(data []byte) (*Config, error) {
	config := &Config{}
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(config); err != nil {
		return nil, fmt.Errorf("not the JSON that is expected: %w", err)
	}
	if _, err := decoder.Token(); err != io.EOF {
		return nil, fmt.Errorf("bytes follow the JSON object")
	}
	return config, config.check()
}

func (c *Config) check() error {
	for _, text := range []struct{ name, value string }{
		{"node", c.Node}, {"controller.name", c.Controller.Name}, {"controller.address", c.Controller.Address},
	} {
		if text.value == "" || len(text.value) > nameBytesMax || policy.Printable(text.value, nameBytesMax) != text.value {
			return fmt.Errorf("%s is %q, not a name of at most %d printable characters", text.name, text.value, nameBytesMax)
		}
	}
	for _, path := range []struct{ name, value string }{
		{"guard_socket", c.GuardSocket}, {"register_socket", c.RegisterSocket}, {"controller.ca", c.Controller.CA},
		{"controller.cert", c.Controller.Cert}, {"controller.key", c.Controller.Key}, {"operator_key", c.OperatorKey},
		{"state_dir", c.StateDir}, {"verdict_log", c.VerdictLog}, {"timing_log", c.TimingLog},
	} {
		if !filepath.IsAbs(path.value) {
			return fmt.Errorf("%s is %q, not an absolute path", path.name, path.value)
		}
	}
	if c.TLSRoots != "" && !filepath.IsAbs(c.TLSRoots) {
		return fmt.Errorf("tls_roots is %q, not an absolute path", c.TLSRoots)
	}
	if _, _, err := net.SplitHostPort(c.Controller.Address); err != nil {
		return fmt.Errorf("controller.address is %q, not host:port", c.Controller.Address)
	}
	if c.LeaseMS < 1 || c.LeaseMS > leaseMSMax {
		return fmt.Errorf("lease_ms is %d, not from 1 to %d", c.LeaseMS, leaseMSMax)
	}
	if c.AdmitWaitMS < 0 || c.AdmitWaitMS > admitWaitMSMax {
		return fmt.Errorf("admit_wait_ms is %d, not from 0 to %d", c.AdmitWaitMS, admitWaitMSMax)
	}
	for host, addresses := range c.Names {
		if host == "" || len(host) > nameBytesMax || host != strings.ToLower(host) || strings.HasSuffix(host, ".") {
			return fmt.Errorf("names has %q, not a host in lower case without a final dot", host)
		}
		if len(addresses) == 0 || len(addresses) > addressesMax {
			return fmt.Errorf("names.%s has %d addresses, not from 1 to %d", host, len(addresses), addressesMax)
		}
		for _, address := range addresses {
			if parsed, err := netip.ParseAddr(address); err != nil || !parsed.Is4() {
				return fmt.Errorf("names.%s has %q, not an IPv4 address", host, address)
			}
		}
	}
	return c.Incoming.check()
}

func (i *Incoming) check() error {
	if i.Port < 1 || i.Port > 65535 {
		return fmt.Errorf("incoming.port is %d, not from 1 to 65535", i.Port)
	}
	if len(i.Sources) == 0 || len(i.Sources) > sourcesMax {
		return fmt.Errorf("incoming.sources has %d entries, not from 1 to %d", len(i.Sources), sourcesMax)
	}
	for _, source := range i.Sources {
		if prefix, err := netip.ParsePrefix(source); err != nil || !prefix.Addr().Is4() {
			return fmt.Errorf("incoming.sources has %q, not an IPv4 range like 10.137.0.1/32", source)
		}
	}
	if !strings.HasPrefix(i.HealthPath, "/") || len(i.HealthPath) > nameBytesMax ||
		policy.Printable(i.HealthPath, nameBytesMax) != i.HealthPath || strings.ContainsAny(i.HealthPath, " ?#%") {
		return fmt.Errorf("incoming.health_path is %q, not a plain path", i.HealthPath)
	}
	return nil
}

// loadOperatorKey reads the PEM of the operator's Ed25519 public key.
func loadOperatorKey(path string) (ed25519.PublicKey, error) {
	refuse := func(format string, args ...any) error {
		return environment("agent.operator_key", "cannot read the operator's public key "+path,
			"put the public half there that `kalium pki` wrote next to the operator's key", format, args...)
	}
	data, err := readBounded(path, configBytesMax)
	if err != nil {
		return nil, refuse("%v", err)
	}
	block, rest := pem.Decode(data)
	if block == nil || block.Type != "PUBLIC KEY" || len(bytes.TrimSpace(rest)) != 0 {
		return nil, refuse("the file is not exactly one PEM block PUBLIC KEY")
	}
	parsed, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, refuse("%v", err)
	}
	key, ok := parsed.(ed25519.PublicKey)
	if !ok {
		return nil, refuse("the key is a %T, not an Ed25519 key", parsed)
	}
	return key, nil
}
