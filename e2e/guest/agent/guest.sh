# What every script in a guest can call. Each waits as long as it takes: who runs the
# script sets the limit.

# await CONDITION: until the condition, a piece of script, holds
await() {
	until eval "$*"; do sleep 0.1; done
}

# nvme_device UUID: prints the block device of that nvmeNamespace once it is there
nvme_device() {
	local f d
	while :; do
		for f in /sys/block/nvme*n*/uuid; do
			d=${f%/uuid}
			d=/dev/${d##*/}
			if [ "$(cat "$f" 2>/dev/null)" = "$1" ] && [ -b "$d" ]; then
				echo "$d"
				return
			fi
		done
		sleep 0.1
	done
}

# nvme_controller NQN: prints the name of a controller of that subsystem, such as nvme0,
# once it is there
nvme_controller() {
	local f
	while :; do
		for f in /sys/class/nvme/nvme*/subsysnqn; do
			if [ "$(cat "$f" 2>/dev/null)" = "$1" ]; then
				f=${f%/subsysnqn}
				echo "${f##*/}"
				return
			fi
		done
		sleep 0.1
	done
}
