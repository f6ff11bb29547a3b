package agent

import (
	"bytes"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unicode"

	"kalium.dev/kalium/runtime/internal/policy"
)

// DefaultConfigPath is where site.yml writes the configuration.
const DefaultConfigPath = "/etc/kalium/agent.json"

// Config is the content of agent.json; docs/reference/agent.md explains the fields.
type Config struct {
	Node           string              `json:"node"`
	GuardSocket    string              `json:"guard_socket"`
	RegisterSocket string              `json:"register_socket"`
	Controllers    []Controller        `json:"controllers"` // one of them is connected at a time
	TLS            TLS                 `json:"tls"`
	OperatorKey    string              `json:"operator_key"`
	StateDir       string              `json:"state_dir"`
	VerdictLog     string              `json:"verdict_log"`
	TimingLog      string              `json:"timing_log"`
	Names          map[string][]string `json:"names"`
	Incoming       Incoming            `json:"incoming"`
	LeaseMS        int                 `json:"lease_ms"`
	TLSRoots       string              `json:"tls_roots"`     // "": none
	AdmitWaitMS    int                 `json:"admit_wait_ms"` // 0: a hello before its registration is refused at once
	Audit          *Audit              `json:"audit"`         // nil: there is no audit log
	Metrics        *Metrics            `json:"metrics"`       // nil: they are served nowhere

	// peerUID is whose processes may use the sockets: root's. Tests that do not run as root set another one.
	peerUID uint32
}

// Controller says where a controller is.
type Controller struct {
	Address string `json:"address"`
	Name    string `json:"name"` // in its certificate
}

// TLS says how both sides prove who they are: paths of the site's CA and of the agent's own pair.
type TLS struct {
	CA   string `json:"ca"`
	Cert string `json:"cert"`
	Key  string `json:"key"`
}

// Audit says where the audit log is, who signs it and how often it is made durable.
type Audit struct {
	Log    string `json:"log"`
	Key    string `json:"key"`   // of the agent, Ed25519
	Fsync  string `json:"fsync"` // one of FsyncAlways, FsyncInterval, FsyncNever
	MaxMiB int    `json:"max_mib"`
}

// When the audit log is made durable.
const (
	FsyncAlways   = "always"
	FsyncInterval = "interval"
	FsyncNever    = "never"
)

// Metrics says at which address of the node they are served.
type Metrics struct {
	Listen string `json:"listen"`
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
	if err := checkKeys(json.NewDecoder(bytes.NewReader(data))); err != nil {
		return nil, fmt.Errorf("not the JSON that is expected: %w", err)
	}
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

// checkKeys refuses what encoding/json takes although two readers could understand it differently: a field that is there
// twice, and a field in another spelling of its letters.
func checkKeys(decoder *json.Decoder) error {
	token, err := decoder.Token()
	if err != nil {
		return err
	}
	opened, is := token.(json.Delim)
	if !is {
		return nil
	}
	seen := map[string]struct{}{}
	for decoder.More() {
		if opened == '{' {
			token, err := decoder.Token()
			if err != nil {
				return err
			}
			key := token.(string) // the decoder takes nothing else here
			if strings.ContainsFunc(key, func(r rune) bool { return r > unicode.MaxASCII || unicode.IsUpper(r) }) {
				return fmt.Errorf("unknown field %q: the names of fields and hosts are in lower case", key)
			}
			if _, twice := seen[key]; twice {
				return fmt.Errorf("the field %q is there twice", key)
			}
			seen[key] = struct{}{}
		}
		if err := checkKeys(decoder); err != nil {
			return err
		}
	}
	_, err = decoder.Token()
	return err
}

func checkText(name, value string) error {
	if value == "" || len(value) > nameBytesMax || policy.Printable(value, nameBytesMax) != value {
		return fmt.Errorf("%s is %q, not a name of at most %d printable characters", name, value, nameBytesMax)
	}
	return nil
}

func checkPath(name, value string) error {
	if !filepath.IsAbs(value) {
		return fmt.Errorf("%s is %q, not an absolute path", name, value)
	}
	return nil
}

func (c *Config) check() error {
	if err := checkText("node", c.Node); err != nil {
		return err
	}
	for _, path := range []struct{ name, value string }{
		{"guard_socket", c.GuardSocket}, {"register_socket", c.RegisterSocket}, {"tls.ca", c.TLS.CA},
		{"tls.cert", c.TLS.Cert}, {"tls.key", c.TLS.Key}, {"operator_key", c.OperatorKey},
		{"state_dir", c.StateDir}, {"verdict_log", c.VerdictLog}, {"timing_log", c.TimingLog},
	} {
		if err := checkPath(path.name, path.value); err != nil {
			return err
		}
	}
	if c.TLSRoots != "" {
		if err := checkPath("tls_roots", c.TLSRoots); err != nil {
			return err
		}
	}
	if err := checkControllers(c.Controllers); err != nil {
		return err
	}
	if c.Audit != nil {
		if err := c.Audit.check(); err != nil {
			return err
		}
	}
	if c.Metrics != nil {
		if err := c.Metrics.check(); err != nil {
			return err
		}
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

func checkControllers(controllers []Controller) error {
	if len(controllers) == 0 || len(controllers) > controllersMax {
		return fmt.Errorf("controllers has %d entries, not from 1 to %d", len(controllers), controllersMax)
	}
	for i, controller := range controllers {
		field := fmt.Sprintf("controllers[%d]", i)
		if err := errors.Join(checkText(field+".address", controller.Address), checkText(field+".name", controller.Name)); err != nil {
			return err
		}
		host, port, err := net.SplitHostPort(controller.Address)
		if err != nil || host == "" || !isPort(port) {
			return fmt.Errorf("%s.address is %q, not host:port", field, controller.Address)
		}
		for _, before := range controllers[:i] {
			if before.Address == controller.Address {
				return fmt.Errorf("%s.address is %q, which an entry before it has", field, controller.Address)
			}
		}
	}
	return nil
}

func isPort(text string) bool {
	port, err := strconv.ParseUint(text, 10, 16)
	return err == nil && port > 0
}

func (a *Audit) check() error {
	if err := errors.Join(checkPath("audit.log", a.Log), checkPath("audit.key", a.Key)); err != nil {
		return err
	}
	if a.Fsync != FsyncAlways && a.Fsync != FsyncInterval && a.Fsync != FsyncNever {
		return fmt.Errorf("audit.fsync is %q, not one of %s, %s and %s", a.Fsync, FsyncAlways, FsyncInterval, FsyncNever)
	}
	if a.MaxMiB < 1 || a.MaxMiB > auditMiBMax {
		return fmt.Errorf("audit.max_mib is %d, not from 1 to %d", a.MaxMiB, auditMiBMax)
	}
	return nil
}

func (m *Metrics) check() error {
	if address, err := netip.ParseAddrPort(m.Listen); err != nil || address.Port() == 0 {
		return fmt.Errorf("metrics.listen is %q, not address:port like 127.0.0.1:5002", m.Listen)
	}
	return nil
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
