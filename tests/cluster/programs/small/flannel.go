package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

const leasePath = "/run/flannel/subnet.env"

// flannel is a CNI plugin: it tells the bridge plugin what flanneld found out, and what its caller's `delegate` adds.
func flannel() error {
	if os.Getenv("CNI_COMMAND") == "VERSION" {
		return json.NewEncoder(os.Stdout).Encode(map[string]any{"cniVersion": "1.0.0", "supportedVersions": []string{"0.3.1", "0.4.0", "1.0.0"}})
	}
	given, err := io.ReadAll(os.Stdin)
	if err != nil {
		return refused(err)
	}
	lease, err := os.ReadFile(leasePath)
	if err != nil {
		return refused(err)
	}
	configuration, err := bridge(given, string(lease))
	if err != nil {
		return refused(err)
	}
	return delegated("bridge", configuration)
}

// refused prints an error as CNI has it; the exit status says it again.
func refused(err error) error {
	_ = json.NewEncoder(os.Stdout).Encode(map[string]any{"cniVersion": "1.0.0", "code": 11, "msg": err.Error()})
	return err
}

// bridge is the configuration of the bridge plugin for the network configuration `given` and flanneld's `lease`.
func bridge(given []byte, lease string) ([]byte, error) {
	var asked struct {
		Name       string         `json:"name"`
		CNIVersion string         `json:"cniVersion"`
		Delegate   map[string]any `json:"delegate"`
	}
	if err := json.Unmarshal(given, &asked); err != nil {
		return nil, fmt.Errorf("cannot read the network configuration: %w", err)
	}
	values := map[string]string{}
	for _, line := range strings.Split(lease, "\n") {
		if name, value, found := strings.Cut(line, "="); found {
			values[name] = value
		}
	}
	mtu, err := strconv.Atoi(values["FLANNEL_MTU"])
	if err != nil {
		return nil, fmt.Errorf("cannot read %s: FLANNEL_MTU: %w", leasePath, err)
	}
	subnet, err := netip.ParsePrefix(values["FLANNEL_SUBNET"])
	if err != nil {
		return nil, fmt.Errorf("cannot read %s: FLANNEL_SUBNET: %w", leasePath, err)
	}
	configuration := map[string]any{
		"isGateway": true,
		"ipMasq":    values["FLANNEL_IPMASQ"] != "true", // who does it: flanneld or the bridge
		"mtu":       mtu,
		"ipam": map[string]any{
			"type":   "host-local",
			"ranges": [][]map[string]string{{{"subnet": subnet.Masked().String()}}},
			"routes": []map[string]string{{"dst": values["FLANNEL_NETWORK"]}},
		},
	}
	for name, value := range asked.Delegate {
		configuration[name] = value
	}
	configuration["name"], configuration["cniVersion"], configuration["type"] = asked.Name, asked.CNIVersion, "bridge"
	return json.Marshal(configuration)
}

// delegated runs a plugin of CNI_PATH in place of this one: what it prints is the answer.
func delegated(plugin string, configuration []byte) error {
	for _, folder := range filepath.SplitList(os.Getenv("CNI_PATH")) {
		path := filepath.Join(folder, plugin)
		if _, err := os.Stat(path); err != nil {
			continue
		}
		command := exec.Command(path)
		command.Stdin, command.Stdout, command.Stderr = bytes.NewReader(configuration), os.Stdout, os.Stderr
		return command.Run()
	}
	return refused(fmt.Errorf("no plugin %s in %s", plugin, os.Getenv("CNI_PATH")))
}
