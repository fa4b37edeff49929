package guest

import (
	"context"
	"fmt"
	"strings"
)

// KernelTarget is a subsystem of the guest's own NVMe target (nvmet), on one port.
//
// The module of its transport must be loaded: nvmet-tcp or nvmet-rdma. For rdma, call
// RDMA first.
type KernelTarget struct {
	NQN       string
	Transport string   // "tcp" or "rdma"
	Address   string   // default 10.0.2.15, where this machine's forwarded ports arrive
	Service   string   // default "4420"
	Hosts     []string // NQNs that may connect; none: any
	Serial    string   // default "KERNEL"
	Model     string   // default "Linux nvmet"
}

func (k *KernelTarget) ensureDefaults() {
	for field, value := range map[*string]string{&k.Address: ownAddress, &k.Service: "4420", &k.Serial: "KERNEL", &k.Model: "Linux nvmet"} {
		if *field == "" {
			*field = value
		}
	}
}

// ownAddress is the guest's in user networking.
const ownAddress = "10.0.2.15"

func (k *KernelTarget) subsystem() string { return "/sys/kernel/config/nvmet/subsystems/" + k.NQN }

// port is the folder of the target's port, whose number follows from what it is.
func (k *KernelTarget) port() string {
	return "/sys/kernel/config/nvmet/ports/" + map[string]string{"tcp": "1", "rdma": "2"}[k.Transport] + k.Service
}

// configure runs a script that must succeed.
func (g *Guest) configure(ctx context.Context, what, script string) error {
	out, code, err := g.Run(ctx, "set -e\n"+script)
	if err == nil && code != 0 {
		err = fmt.Errorf("status %d: %s", code, strings.TrimSpace(out))
	}
	if err != nil {
		return fmt.Errorf("%s in guest: %w", what, err)
	}
	return nil
}

// ServeNVMe makes the subsystem and its port, without nvmeNamespaces, and listens.
func (g *Guest) ServeNVMe(ctx context.Context, k KernelTarget) error {
	k.ensureDefaults()
	var hosts strings.Builder
	for _, nqn := range k.Hosts {
		fmt.Fprintf(&hosts, "mkdir -p ../../hosts/%[1]s; ln -s ../../hosts/%[1]s allowed_hosts/\n", nqn)
	}
	if len(k.Hosts) == 0 {
		hosts.WriteString("echo 1 >attr_allow_any_host\n")
	}
	return g.configure(ctx, "make nvmet subsystem "+k.NQN, fmt.Sprintf(`
		mountpoint -q /sys/kernel/config || mount -t configfs none /sys/kernel/config
		mkdir %[1]s; cd %[1]s
		%[2]s
		echo -n '%[3]s' >attr_serial; echo -n '%[4]s' >attr_model
		if [ ! -d %[5]s ]; then
			mkdir %[5]s; cd %[5]s
			echo ipv4 >addr_adrfam; echo %[6]s >addr_trtype; echo %[7]s >addr_traddr; echo %[8]s >addr_trsvcid
		fi
	`, k.subsystem(), hosts.String(), k.Serial, k.Model, k.port(), k.Transport, k.Address, k.Service)+k.listen())
}

func (k *KernelTarget) listen() string {
	return fmt.Sprintf("\nln -s %s %s/subsystems/\n", k.subsystem(), k.port())
}

// SuspendNVMe makes the target's subsystem unreachable and drops its hosts, until
// ResumeNVMe.
func (g *Guest) SuspendNVMe(ctx context.Context, k KernelTarget) error {
	k.ensureDefaults()
	return g.configure(ctx, "suspend "+k.NQN, fmt.Sprintf("rm %s/subsystems/%s", k.port(), k.NQN))
}

// ResumeNVMe ends SuspendNVMe.
func (g *Guest) ResumeNVMe(ctx context.Context, k KernelTarget) error {
	k.ensureDefaults()
	return g.configure(ctx, "resume "+k.NQN, k.listen())
}

// AddNvmeNamespace attaches a block device or file of the guest; hosts that are
// connected hear of it.
func (g *Guest) AddNvmeNamespace(ctx context.Context, k KernelTarget, nsid uint32, uuid, path string) error {
	return g.configure(ctx, fmt.Sprintf("add nvmeNamespace %d to %s", nsid, k.NQN), fmt.Sprintf(`
		mkdir %[1]s/namespaces/%[2]d; cd %[1]s/namespaces/%[2]d
		echo -n %[3]s >device_path; echo %[4]s >device_uuid; echo 1 >enable`, k.subsystem(), nsid, path, uuid))
}

// RemoveNvmeNamespace detaches it.
func (g *Guest) RemoveNvmeNamespace(ctx context.Context, k KernelTarget, nsid uint32) error {
	return g.configure(ctx, fmt.Sprintf("remove nvmeNamespace %d of %s", nsid, k.NQN),
		fmt.Sprintf("cd %s/namespaces/%d; echo 0 >enable; cd ..; rmdir %[2]d", k.subsystem(), nsid))
}

// RDMA makes a software RDMA device (rdma_rxe) on the guest's network card, by which
// the guest reaches itself at the address returned. Load the modules rdma_rxe and
// rdma_ucm, and nvmet-rdma or nvme-rdma for what is to use it.
func (g *Guest) RDMA(ctx context.Context) (address string, err error) {
	return ownAddress, g.configure(ctx, "make RDMA device", "rdma link add rxe0 type rxe netdev eth0; await '[ -e /sys/class/infiniband/rxe0/ports/1/gids/0 ]'")
}
