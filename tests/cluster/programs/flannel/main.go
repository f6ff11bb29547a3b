// Command flanneld joins the networks of a cluster's nodes. Upstream's program links every backend, one of them from a module that cannot
// be fetched; this one links VXLAN and host-gw, asks Kubernetes alone, and takes the flags that manifests give it.
package main

import (
	"context"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/flannel-io/flannel/pkg/backend"
	_ "github.com/flannel-io/flannel/pkg/backend/hostgw"
	_ "github.com/flannel-io/flannel/pkg/backend/vxlan"
	"github.com/flannel-io/flannel/pkg/ip"
	"github.com/flannel-io/flannel/pkg/ipmatch"
	"github.com/flannel-io/flannel/pkg/subnet/kube"
	"github.com/flannel-io/flannel/pkg/trafficmngr"
	"github.com/flannel-io/flannel/pkg/trafficmngr/iptables"
	"github.com/flannel-io/flannel/pkg/trafficmngr/nftables"
	"k8s.io/klog/v2"
)

var (
	masquerade = flag.Bool("ip-masq", false, "translate addresses of what leaves the pods' network")
	onNetwork  = flag.String("iface", "", "link or address by which the nodes reach each other (default: that of the default route)")
	subnets    = flag.Bool("kube-subnet-mgr", false, "ask Kubernetes for this node's network; required")
	healthIP   = flag.String("healthz-ip", "0.0.0.0", "address of /healthz and /readyz")
	healthPort = flag.Int("healthz-port", 0, "their port; 0: none")
	lease      = flag.String("subnet-file", "/run/flannel/subnet.env", "where the CNI plugin reads this node's network")
	network    = flag.String("net-config-path", "/etc/kube-flannel/net-conf.json", "the pods' network")
	resync     = flag.Int("iptables-resync", 5, "seconds between two looks at the rules")
)

// ready is whether the CNI plugin can work.
var ready atomic.Bool

func main() {
	klog.InitFlags(nil)
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "flanneld:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	if !*subnets {
		return fmt.Errorf("there is no other way than --kube-subnet-mgr")
	}
	if *healthPort > 0 {
		listener, err := net.Listen("tcp", net.JoinHostPort(*healthIP, strconv.Itoa(*healthPort)))
		if err != nil {
			return err
		}
		go func() { klog.Error(http.Serve(listener, health())) }()
	}
	manager, err := kube.NewSubnetManager(ctx, "", "", "flannel.alpha.coreos.com", *network, true)
	if err != nil {
		return err
	}
	config, err := manager.GetNetworkConfig(ctx)
	if err != nil {
		return err
	}
	family, err := ipmatch.GetIPFamily(config.EnableIPv4, config.EnableIPv6)
	if err != nil {
		return err
	}
	link, err := ipmatch.LookupExtIface(*onNetwork, "", "", family, ipmatch.PublicIPOpts{})
	if err != nil {
		return err
	}
	kind, err := backend.NewManager(ctx, manager, link).GetBackend(config.BackendType)
	if err != nil {
		return err
	}
	var running sync.WaitGroup
	joined, err := kind.RegisterNetwork(ctx, &running, config)
	if err != nil {
		return err
	}
	var rules trafficmngr.TrafficManager = &iptables.IPTablesManager{}
	if config.EnableNFTables {
		rules = &nftables.NFTablesManager{}
	}
	if err := rules.Init(ctx); err != nil {
		return err
	}
	if *masquerade {
		// What an earlier run left is only looked for where its network was another; these say there was none.
		var no4 ip.IP4Net
		var no6 ip.IP6Net
		if err := rules.SetupAndEnsureMasqRules(ctx, config.Network, no4, no4, config.IPv6Network, no6, no6, joined.Lease(), *resync, false); err != nil {
			return err
		}
	}
	rules.SetupAndEnsureForwardRules(ctx, config.Network, config.IPv6Network, *resync)
	if err := manager.HandleSubnetFile(*lease, config, *masquerade, joined.Lease().Subnet, joined.Lease().IPv6Subnet, joined.MTU()); err != nil {
		return err
	}
	ready.Store(true)
	running.Add(1)
	go func() {
		defer running.Done()
		joined.Run(ctx)
	}()
	err = manager.CompleteLease(ctx, joined.Lease(), &running)
	running.Wait()
	return err
}

func health() http.Handler {
	answers := http.NewServeMux()
	answers.HandleFunc("/healthz", func(http.ResponseWriter, *http.Request) {})
	answers.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) {
		if !ready.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	})
	return answers
}
