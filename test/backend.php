<?php
/* A PHP back end, as people have one: it finds the gateways through the register and orders them about.
 *
 *     php backend.php REGISTER [KEY [keep [LIBRARY]]]
 *
 * Each line of stdin is a call, ["method", [arguments]], and is answered by a line of stdout: {"returns": value} or
 * {"throws": "why"}. The methods are those of the class below, which opens a connection for each command, or with
 * "keep" one for each gateway; with LIBRARY they are those of the real one, whose Gateway.php that is.
 *
 *     php backend.php random N
 *
 * prints N lines [hex, json, hex, hex]: a serialized array, its JSON, another array, and both merged. */

class Client
{
    private array $kept = [];

    public function __construct(private string $register, private string $key, private bool $keep)
    {
    }

    /* -- the wire ------------------------------------------------------------------------------------------- */

    private function connect(string $address)
    {
        $stream = @stream_socket_client("tcp://$address", $code, $why, 3);
        if (!$stream) {
            throw new Exception("$address: $why");
        }
        stream_set_timeout($stream, 5);
        return $stream;
    }

    private function gateways(): array
    {
        $register = $this->connect($this->register);
        fwrite($register, json_encode(['event' => 'worker_connect', 'secret_key' => $this->key]) . "\n");
        $line = fgets($register);
        fclose($register);
        $list = json_decode((string)$line, true)['addresses'] ?? [];
        if (!$list) {
            throw new Exception('the register names no gateway');
        }
        return $list;
    }

    private static function packet(int $cmd, int $conn, string $ext, string $body, int $flag): string
    {
        $length = 28 + strlen($ext) + strlen($body);
        return pack('NCNnNnNCnN', $length, $cmd, 0, 0, 0, 0, $conn, $flag, 0, strlen($ext)) . $ext . $body;
    }

    private static function read($stream, int $n): string
    {
        for ($data = ''; strlen($data) < $n; $data .= $more) {
            $more = fread($stream, $n - strlen($data));
            if ($more === false || $more === '') {
                throw new Exception('no answer');
            }
        }
        return $data;
    }

    /* One command to one gateway; its answer, if there is one, still serialized. */
    private function tell(string $address, bool $answered, int $cmd, int $conn, string $ext, $body = '', $flag = 1)
    {
        $stream = $this->kept[$address] ?? $this->connect($address);
        $hello = $this->key === '' ? '' : self::packet(202, 0, '', json_encode(['secret_key' => $this->key]), 1);
        fwrite($stream, $hello . self::packet($cmd, $conn, $ext, $body, $flag));
        $answer = $answered ? self::read($stream, unpack('N', self::read($stream, 4))[1]) : null;
        if ($this->keep) {
            $this->kept[$address] = $stream;
        } else {   // the library just closes; then the next connection may be heard before this one
            stream_socket_shutdown($stream, STREAM_SHUT_WR);
            stream_get_contents($stream);
            fclose($stream);
        }
        return $answer;
    }

    private static function split(string $id): array
    {
        if (strlen($id) !== 20) {
            throw new Exception("'$id' is no client id");
        }
        $parts = unpack('Nip/nport/Nconn', hex2bin($id));
        return [long2ip($parts['ip']) . ":$parts[port]", $parts['conn']];
    }

    private static function id(string $address, int $conn): string
    {
        [$ip, $port] = explode(':', $address);
        return bin2hex(pack('NnN', ip2long($ip), $port, $conn));
    }

    private function one(string $id, bool $answered, int $cmd, string $ext = '', string $body = '', int $flag = 1)
    {
        [$address, $conn] = self::split($id);
        return $this->tell($address, $answered, $cmd, $conn, $ext, $body, $flag);
    }

    private function all(int $cmd, string $ext, string $body = '', int $flag = 1): void
    {
        foreach ($this->gateways() as $address) {
            $this->tell($address, false, $cmd, 0, $ext, $body, $flag);
        }
    }

    /* Address of gateway => what it answers. */
    private function query(int $cmd, string $ext): array
    {
        $answers = [];
        foreach ($this->gateways() as $address) {
            $answers[$address] = unserialize($this->tell($address, true, $cmd, 0, $ext));
        }
        return $answers;
    }

    /* Body and flag of a message. */
    private static function message($message): array
    {
        return is_scalar($message) ? [(string)$message, 1] : [serialize($message), 0];
    }

    /* Client ids by gateway, as the commands want them: address => {number: number}. */
    private static function by_gateway($ids): array
    {
        $found = [];
        foreach ((array)$ids as $id) {
            [$address, $conn] = self::split($id);
            $found[$address][$conn] = $conn;
        }
        return $found;
    }

    private static function sessions(array $answers): array
    {
        $found = [];
        foreach ($answers as $address => $sessions) {
            foreach ($sessions as $conn => $session) {
                $found[self::id($address, $conn)] = $session === '' ? [] : unserialize($session);
            }
        }
        return $found;
    }

    /* -- messages ------------------------------------------------------------------------------------------- */

    public function sendToClient($id, $message)
    {
        $this->one($id, false, 5, '', ...self::message($message));
        return true;
    }

    public function sendToAll($message, $ids = null, $except = null)
    {
        [$body, $flag] = self::message($message);
        if (is_array($ids)) {
            foreach (self::by_gateway(array_diff($ids, (array)$except)) as $address => $list) {
                $this->tell($address, false, 6, 0, json_encode(['connections' => $list]), $body, $flag);
            }
            return;
        }
        $except = self::by_gateway($except);
        foreach ($this->gateways() as $address) {
            $ext = isset($except[$address]) ? json_encode(['exclude' => $except[$address]]) : '';
            $this->tell($address, false, 6, 0, $ext, $body, $flag);
        }
    }

    public function sendToGroup($groups, $message, $except = null)
    {
        $except = self::by_gateway($except);
        foreach ($this->gateways() as $address) {
            $ext = json_encode(['group' => (array)$groups, 'exclude' => $except[$address] ?? null]);
            $this->tell($address, false, 22, 0, $ext, ...self::message($message));
        }
    }

    public function sendToUid($uids, $message)
    {
        $this->all(14, json_encode((array)$uids), ...self::message($message));
    }

    public function closeClient($id, $message = null)
    {
        $this->one($id, false, 7, '', ...self::message($message));
        return true;
    }

    public function destoryClient($id)   /* as the real one has it */
    {
        $this->one($id, false, 8);
        return true;
    }

    /* -- who is there --------------------------------------------------------------------------------------- */

    public function isOnline($id)
    {
        return unserialize($this->one($id, true, 11));
    }

    public function getClientIdByUid($uid)
    {
        $found = [];
        foreach ($this->query(15, (string)$uid) as $address => $list) {
            foreach ($list as $conn) {
                $found[] = self::id($address, $conn);
            }
        }
        return $found;
    }

    public function isUidOnline($uid)
    {
        return (int)(count($this->getClientIdByUid($uid)) > 0);
    }

    public function getUidByClientId($id)
    {
        [$address, $conn] = self::split($id);
        $ext = json_encode(['fields' => ['uid'], 'where' => ['connection_id' => [$conn => $conn]]]);
        return unserialize($this->tell($address, true, 25, 0, $ext))[$conn]['uid'] ?? null;
    }

    public function getAllClientSessions()
    {
        return self::sessions($this->query(10, ''));
    }

    public function getClientSessionsByGroup($group)
    {
        return self::sessions($this->query(23, (string)$group));
    }

    public function getClientCountByGroup($group = '')
    {
        return array_sum($this->query(24, (string)$group));
    }

    public function getAllClientCount()
    {
        return $this->getClientCountByGroup();
    }

    /* -- uids, groups and sessions -------------------------------------------------------------------------- */

    public function bindUid($id, $uid)
    {
        $this->one($id, false, 12, (string)$uid);
    }

    public function unbindUid($id, $uid)
    {
        $this->one($id, false, 13, (string)$uid);
    }

    public function joinGroup($id, $group)
    {
        $this->one($id, false, 20, (string)$group);
    }

    public function leaveGroup($id, $group)
    {
        $this->one($id, false, 21, (string)$group);
    }

    public function ungroup($group)
    {
        $this->all(27, (string)$group);
    }

    public function getSession($id)
    {
        return @unserialize($this->one($id, true, 203));
    }

    public function setSession($id, $session)
    {
        $this->one($id, false, 204, serialize($session));
    }

    public function updateSession($id, $session)
    {
        $this->one($id, false, 9, serialize($session));
    }

    public function setSocketSession($id, $session)
    {
        $this->one($id, false, 204, $session);
        return true;
    }
}

/* An array of anything, for `random`. */
function anything(int $depth)
{
    $texts = ['', 'a/b', 'ä你😀', "\"\\\n\t\x01\x7f", '77', '<&>'];
    switch (random_int(0, $depth > 0 ? 9 : 6)) {
        case 0:
            return null;
        case 1:
            return random_int(0, 1) === 1;
        case 2:
            return [0, -5, PHP_INT_MAX, PHP_INT_MIN, random_int(-1000, 1000)][random_int(0, 4)];
        case 3:
            return $texts[random_int(0, 5)];
        case 4:
            return [0.0, -0.0, 1.0, 0.1, 1e15, 1e17, 1e25, 0.0001, 0.00001, 1.5e-7, 1.7976931348623157e308, 5e-324,
                123456789012345680.0, 99999999999999990.0][random_int(0, 13)];
        case 5:
            return random_int(-1000000, 1000000) / 10 ** random_int(0, 12);
        case 6:
            do {
                $double = unpack('d', random_bytes(8))[1];
            } while (!is_finite($double));
            return $double;
        default:
            for ($array = [], $n = random_int(0, 4); $n > 0; $n--) {
                $value = anything($depth - 1);
                if (random_int(0, 1)) {
                    $array[] = $value;
                } else {
                    $array[['k', 'l', '5', '-3', '07', 'm'][random_int(0, 5)]] = $value;
                }
            }
            return $array;
    }
}

function run(array $arguments): void
{
    [, $register, $key, $keep, $library] = $arguments + [1 => '', '', '', ''];
    if ($register === 'random') {
        while ($key-- > 0) {
            [$one, $two] = [['m' => anything(3), anything(3)], ['m' => anything(3), 'n' => anything(2)]];
            $hex = array_map('bin2hex', array_map('serialize', [$one, $two, array_replace_recursive($one, $two)]));
            echo json_encode([$hex[0], json_encode($one, JSON_UNESCAPED_UNICODE), $hex[1], $hex[2]]), "\n";
        }
        return;
    }
    if ($library !== '') {
        require $library;
        /* A kept connection may hold back what it sends (Nagle), and a question on a new one overtakes it. */
        stream_context_set_default(['socket' => ['tcp_nodelay' => true]]);
        $client = 'GatewayClient\Gateway';
        $client::$registerAddress = $register;
        $client::$secretKey = $key;
        $client::$persistentConnection = $keep !== '';
    } else {
        $client = new Client($register, $key, $keep !== '');
    }
    while (($line = fgets(STDIN)) !== false) {
        [$method, $values] = json_decode($line, true);
        ob_start();   // the library prints what it thinks of its older names and of empty groups
        try {
            $answer = ['returns' => call_user_func_array([$client, $method], $values)];
        } catch (Throwable $error) {
            $answer = ['throws' => $error->getMessage()];
        }
        ob_end_clean();
        echo json_encode($answer, JSON_UNESCAPED_UNICODE), "\n";
    }
}

run($argv);
